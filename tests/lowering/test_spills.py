"""Registers that kernels spill, by compiling them for an H100 without one.

    python -m pytest -m slow tests/lowering/test_spills.py

Every kernel of every public shape is compiled to machine code, and ptxas says
how many bytes of registers a thread spills. `KNOWN` lists what is known to
spill: nothing else may, and nothing may spill more. Lower a row when a kernel
gets better.
"""

import re

import jax
import pytest

from experiments.common import problem, programs, shapes
import paged_jax
from tests.lowering import cuda

pytestmark = pytest.mark.slow

# Bytes of spill stores or loads, the greater one, by shape and kernel; with jax
# 0.11.2 and the ptxas of nvidia-cuda-nvcc-cu12 12.9.
KNOWN = {
  "llama3-8b_pre_b4_c4096_p16_qfull_const": dict(paged_prefill=28),
  "llama3-8b_pre_b1_c16384_p16_qfull_const": dict(paged_prefill=28),
  "llama3-8b_pre_b1_c32768_p16_q2048_const": dict(paged_prefill=28),
  "llama3-8b_pre_b16_c4096_p16_qfull_uniform": dict(paged_prefill=24),
  "gemma3-12b_pre_b2_c8192_p64_qfull_const": dict(paged_prefill=160),
  "llama3-8b_pre_b8_c8192_p16_q512_const": dict(paged_prefill=28),
  "gemma3-27b-local_pre_b2_c8192_p16_qfull_const": dict(paged_prefill=108),
  "llama3-8b_mix_c8192_q2048_63xc4096_p16": dict(paged_prefill=24),
  "llama3-8b_pre_b1_c8192_p16_q2048_const": dict(paged_prefill=28),
  "llama3-8b_shared_b64_c8320_p16_s8192": dict(paged_prefill=28),
}

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
_PROPERTIES = re.compile(
  r"Function properties for (\w+)_mosaic_gpu_kernel\n"
  r".* (\d+) bytes spill stores, (\d+) bytes spill loads"
)


@pytest.fixture(scope="module", autouse=True)
def compiler():
  missing = cuda.no_compiler()
  if missing is not None:
    pytest.skip(missing)


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)
@pytest.mark.parametrize("name", _RUNS)
def test_hopper(name, capfd, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  shape = _SHAPES[name.split()[0]]
  spec = problem.specs(shape, 2)
  prepare = programs.ours(shape, _RUNS[name], interpret=False)
  capfd.readouterr()
  compiled = cuda.compile_(
    lambda state, query: prepare(state)(query, 1), spec, spec["query"]
  )
  printed = "".join(capfd.readouterr())
  spilled = {
    kernel: max(int(stores), int(loads))
    for kernel, stores, loads in _PROPERTIES.findall(printed)
  }
  kernels = re.findall(r"(paged_\w+?)_mosaic_gpu", compiled.as_text())
  assert spilled.keys() == set(kernels) and kernels, printed
  known = KNOWN.get(name, {})
  assert {
    kernel: size
    for kernel, size in spilled.items()
    if size > known.get(kernel, 0)
  } == {}


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
