"""Every Triton kernel lowers for CUDA on a host without a GPU."""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

import paged_jax
from tests.lowering import cuda

# name: B, T, N, K, H, p, dtype, and what else the call gets. T=None: decode.
SHAPES = {
  "decode": (4, None, 32, 8, 128, 16, "bfloat16", {}),
  "decode G=7 H=64": (4, None, 14, 2, 64, 16, "bfloat16", {}),
  "decode f16 H=80 p=1": (3, None, 8, 8, 80, 1, "float16", {}),
  "decode f32 H=256 p=256": (1, None, 4, 2, 256, 256, "float32", {}),
  "decode H=96 p=128": (2, None, 8, 2, 96, 128, "bfloat16", {}),
  "decode H=192 p=3": (2, None, 8, 1, 192, 3, "bfloat16", {}),
  "decode H=16": (1, None, 2, 1, 16, 8, "bfloat16", {}),
  "decode G=128": (1, None, 128, 1, 128, 64, "bfloat16", {}),
  "decode all": (64, None, 64, 8, 64, 16, "bfloat16",
                 dict(window=128, soft_cap=30.0, sinks=True, combined=True)),
  "few tokens": (4, 20, 32, 8, 128, 16, "bfloat16",
                 dict(max_query_length=8)),
  "prefill": (4, 512, 32, 8, 128, 16, "bfloat16", {}),
  "prefill G=7 H=64": (2, 100, 14, 2, 64, 16, "bfloat16", {}),
  "prefill f16 H=80 p=1": (2, 100, 8, 8, 80, 1, "float16", {}),
  "prefill f32 H=256": (1, 100, 4, 2, 256, 256, "float32", {}),
  "prefill H=192": (1, 100, 4, 2, 192, 32, "bfloat16", dict(causal=False)),
  "prefill all": (4, 300, 64, 8, 64, 128, "bfloat16",
                  dict(window=128, soft_cap=30.0, sinks=True, combined=True)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_lower(name):
  B, T, N, K, H, p, dtype, options = SHAPES[name]
  text = _lower(B, T, N, K, H, p, dtype, **options)
  kernels = ["paged_decode", "paged_decode_merge"]
  if name.startswith("prefill"):
    kernels = ["paged_prefill"]
  assert text.count("__gpu$xla.gpu.triton") == len(kernels)
  for kernel in kernels:
    assert f'"{kernel}"' in text


def test_a_pool_above_2_31_elements_gets_64_bit_offsets(capfd):
  small, large = (
    _offset_widths(num_pages, capfd) for num_pages in (2**14, 2**18)
  )
  assert "xi64>" not in small and "xi64>" in large


def _offset_widths(num_pages, capfd):
  """Returns the Triton code of the kernels, as Pallas prints it."""
  with pytest.MonkeyPatch.context() as patch:
    plain = pl.pallas_call
    patch.setattr(
      pl, "pallas_call", lambda *a, **k: plain(*a, **k, debug=True)
    )
    _lower(2, None, 8, 8, 128, 16, "bfloat16", num_pages=num_pages)
  text = capfd.readouterr().out
  assert "tt.load" in text
  return text


def _lower(B, T, N, K, H, p, dtype, *, num_pages=50, M=40, sinks=False,
           combined=False, **static):
  def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype)

  def run(query, pool, table, lengths, starts, sinks):
    return paged_jax.paged_attention(
      query, pool, pool, table, lengths, query_starts=starts, sinks=sinks,
      layer=jnp.int32(1), implementation="triton", interpret=False, **static
    )

  table = (B, 2, M) if combined else (B, M)
  return cuda.lower(
    run,
    shape(B if T is None else T, N, H),
    shape(2, num_pages, K, p, H),
    shape(*table, dtype=jnp.int32),
    shape(B, dtype=jnp.int32),
    None if T is None else shape(B + 1, dtype=jnp.int32),
    shape(N, dtype=jnp.float32) if sinks else None,
  )
