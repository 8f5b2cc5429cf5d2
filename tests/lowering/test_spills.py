"""Registers that kernels spill, by compiling them for an H100 without one.

    python -m pytest -m slow tests/lowering/test_spills.py

Every kernel of every public shape, and of the geometries that test_hopper.py
lowers, is compiled to machine code, and ptxas says how many bytes of registers
a thread spills: none.
"""

import re

import jax
import pytest

from experiments.common import problem, programs, shapes
import paged_jax
from tests.lowering import cuda, test_hopper

pytestmark = pytest.mark.slow

_SHAPES = {
  name: shape
  for name, shape in shapes.named().items()
  if not name.startswith("cpu_")
}
_RUNS = {
  name: "hopper" + "+shared_prefix" * (shape.phase == "shared")
  for name, shape in _SHAPES.items()
  if shape.phase != "write"
} | {
  name + " batch_invariant": "hopper+batch_invariant"
  for name in (
    "llama3-8b_dec_b64_c8192_p16_const",
    "llama3-8b_dec_b64_c8192_p128_const",
    "qwen2.5-0.5b_dec_b64_c4096_p16_const",
    "gemma3-12b_dec_b32_c8192_p64_const",
  )
}
_GEOMETRIES = {
  f"{group}, {name}": (case, more)
  for group, cases, more in (
    ("decode", test_hopper.SHAPES, {}),
    ("batch_invariant", test_hopper.SHAPES, dict(batch_invariant=True)),
    ("whole", test_hopper.WHOLE, {}),
    ("prefill", test_hopper.PREFILL, dict(max_query_length=500)),
    ("shared", test_hopper.SHARED, dict(shared_prefix=True)),
  )
  for name, case in cases.items()
}
_needs_jax = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)
_PROPERTIES = re.compile(
  r"Function properties for (\w+)_mosaic_gpu_kernel\n"
  r".* (\d+) bytes spill stores, (\d+) bytes spill loads"
)


@pytest.fixture(scope="module", autouse=True)
def compiler():
  missing = cuda.no_compiler()
  if missing is not None:
    pytest.skip(missing)


@pytest.fixture(name="spilled")
def compile_and_read(capfd, monkeypatch):
  """(run) -> {kernel: bytes}, of the kernels that run() compiles."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

  def measure(run):
    capfd.readouterr()
    text = run().as_text()
    printed = "".join(capfd.readouterr())
    found = {
      kernel: max(int(stores), int(loads))
      for kernel, stores, loads in _PROPERTIES.findall(printed)
    }
    kernels = re.findall(r"(paged_\w+?)_mosaic_gpu", text)
    assert found.keys() == set(kernels) and kernels, printed
    return found

  return measure


def _assert_none(spilled):
  assert {kernel: size for kernel, size in spilled.items() if size} == {}


@_needs_jax
@pytest.mark.parametrize("name", _RUNS)
def test_public_shapes(name, spilled):
  shape = _SHAPES[name.split()[0]]
  spec = problem.specs(shape, 2)
  prepare = programs.ours(shape, _RUNS[name], interpret=False)
  _assert_none(spilled(
    lambda: cuda.compile_(
      lambda state, query: prepare(state)(query, 1), spec, spec["query"]
    )
  ))


@_needs_jax
@pytest.mark.parametrize("name", _GEOMETRIES)
def test_other_geometries(name, spilled):
  (*sizes, static), more = _GEOMETRIES[name]
  _assert_none(spilled(
    lambda: test_hopper.lower(*sizes, how=cuda.compile_, **static, **more)
  ))


@pytest.mark.parametrize(
  "name", [name for name, shape in _SHAPES.items() if shape.phase == "write"]
)
def test_triton_write(name):
  shape = _SHAPES[name]
  spec = problem.specs(shape, 2)
  T = shape.num_tokens

  def run(k_pages, v_pages, k, v, slots):
    return paged_jax.write_kv(
      k_pages, v_pages, k, v, slots, layer=1, implementation="triton",
      interpret=False,
    )

  new = jax.ShapeDtypeStruct((T, *spec["k"].shape[1:]), spec["k"].dtype)
  cuda.compile_(
    run, spec["k_pages"], spec["v_pages"], new, new,
    jax.ShapeDtypeStruct((T,), "int32"),
    options=dict(xla_gpu_fail_ptx_compilation_on_register_spilling=True),
  )
