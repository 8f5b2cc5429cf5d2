"""Every Hopper kernel lowers for CUDA on a host without a GPU."""

import jax
import jax.numpy as jnp
import pytest

import paged_jax
from paged_jax.ops.backend import launch
from tests.lowering import cuda

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)

# name: B, T, N, K, H, p, dtype, and what else the call gets. T=None: decode.
SHAPES = {
  "decode": (4, None, 32, 8, 128, 16, "bfloat16", {}),
  "large batch": (64, None, 32, 8, 128, 16, "bfloat16", {}),
  "G=7 H=64": (64, None, 14, 2, 64, 16, "bfloat16", dict(M=256)),
  "G=7": (3, None, 28, 4, 128, 16, "bfloat16", {}),
  "f16 H=80 p=1": (3, None, 8, 8, 80, 1, "float16", {}),
  "p=2": (3, None, 8, 8, 128, 2, "bfloat16", {}),
  "p=4 H=96": (3, None, 32, 8, 96, 4, "bfloat16", {}),
  "p=8": (3, None, 32, 8, 128, 8, "bfloat16", {}),
  "p=32 H=192": (2, None, 32, 8, 192, 32, "bfloat16", {}),
  "p=64 H=256": (2, None, 16, 8, 256, 64, "bfloat16", {}),
  "p=128": (2, None, 32, 8, 128, 128, "bfloat16", {}),
  "p=256 G=1": (2, None, 8, 8, 128, 256, "bfloat16", {}),
  "G=128": (1, None, 128, 1, 128, 64, "bfloat16", {}),
  "everything": (64, None, 64, 8, 64, 16, "bfloat16",
                 dict(window=900, soft_cap=30.0, sinks=True, combined=True)),
  "H=64, one head": (3, None, 1, 1, 64, 16, "bfloat16", {}),
  "H=80 G=2": (3, None, 4, 2, 80, 16, "bfloat16", {}),
  "H=96 G=1": (3, None, 2, 2, 96, 16, "bfloat16", dict(sinks=True)),
  "H=192 G=1": (3, None, 1, 1, 192, 16, "float16", {}),
  "few tokens": (4, 20, 32, 8, 128, 16, "bfloat16",
                 dict(max_query_length=4, window=99)),
  "few tokens, many rows": (4, 20, 64, 1, 128, 16, "bfloat16",
                            dict(max_query_length=8, causal=False)),
}


# Segments so short that they stay whole: nothing is merged.
WHOLE = {
  "window": (64, None, 64, 8, 64, 16, "bfloat16",
             dict(window=128, soft_cap=30.0, sinks=True, combined=True)),
  "short table": (64, None, 16, 2, 128, 16, "bfloat16", dict(M=4)),
  "many rows": (64, None, 128, 1, 128, 16, "bfloat16", dict(M=4)),
  "heads amid 8 rows": (64, None, 14, 2, 64, 16, "bfloat16", dict(M=4)),
}


# Many tokens a sequence.
PREFILL = {
  "prompts": (4, 640, 32, 8, 128, 16, "bfloat16", {}),
  "T is no multiple of 8": (4, 333, 32, 8, 128, 16, "bfloat16", {}),
  "G=7 H=64": (4, 640, 14, 2, 64, 16, "bfloat16", {}),
  "G=4 H=64 p=8": (4, 640, 8, 2, 64, 8, "bfloat16", {}),
  "G=4 H=64": (4, 640, 32, 8, 64, 16, "bfloat16", {}),
  "G=8 H=64, sinks": (4, 640, 64, 8, 64, 16, "bfloat16", dict(sinks=True)),
  "G=1 H=64 p=256": (2, 640, 2, 2, 64, 256, "float16", {}),
  "G=3 f16 H=80 p=8": (2, 640, 6, 2, 80, 8, "float16", dict(causal=False)),
  "G=1 H=96 p=32": (2, 640, 8, 8, 96, 32, "bfloat16", {}),
  "H=192 p=256": (2, 640, 32, 8, 192, 256, "bfloat16", {}),
  "H=256 p=64": (2, 640, 16, 8, 256, 64, "bfloat16", {}),
  "G=128 p=128": (2, 640, 128, 1, 128, 128, "bfloat16", {}),
  "G=71": (2, 640, 71, 1, 64, 16, "bfloat16", {}),
  # So few tokens for B times the longest query: some tiles are narrow.
  "mixed, G=7 H=64": (8, 333, 14, 2, 64, 16, "bfloat16", {}),
  "mixed, G=1 H=96": (8, 333, 8, 8, 96, 32, "bfloat16", {}),
  "mixed, H=192": (8, 333, 6, 2, 192, 16, "float16", {}),
  "mixed, H=256": (8, 333, 16, 8, 256, 64, "bfloat16", dict(sinks=True)),
  "everything": (2, 640, 64, 8, 64, 16, "bfloat16",
                 dict(window=100, soft_cap=30.0, sinks=True, combined=True)),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_lowers(name):
  *sizes, static = PREFILL[name]
  text = lower(*sizes, max_query_length=500, **static)
  assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
  assert "paged_prefill_mosaic" in text


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_kernels_lower(name, batch_invariant):
  *sizes, static = SHAPES[name]
  text = lower(*sizes, batch_invariant=batch_invariant, **static)
  assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
  assert "paged_decode_mosaic" in text


# Rows that begin alike: the prefix by the prefill kernel, the rest as ever.
SHARED = {
  "decode": (64, None, 32, 8, 128, 16, "bfloat16", dict(M=530)),
  "G=3 H=80": (64, None, 6, 2, 80, 16, "float16", dict(combined=True)),
  "H=96 p=64": (64, None, 8, 8, 96, 64, "bfloat16", dict(sinks=True)),
  "G=7 H=192": (64, None, 14, 2, 192, 32, "bfloat16", {}),
  "H=256, few tokens": (4, 21, 16, 8, 256, 16, "bfloat16",
                        dict(max_query_length=8, soft_cap=30.0)),
  "H=64, many tokens": (4, 333, 14, 2, 64, 8, "bfloat16",
                        dict(max_query_length=100, causal=False)),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_prefixes_lower(name):
  *sizes, static = SHARED[name]
  text = lower(*sizes, shared_prefix=True, **static)
  decode = static.get("max_query_length", 1) <= 8
  assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
  assert "paged_prefill_mosaic" in text
  assert ("paged_decode_mosaic" in text) == decode


@pytest.mark.parametrize("name", WHOLE)
def test_kernels_of_whole_segments_lower(name):
  text = lower(*WHOLE[name][:7], **WHOLE[name][7])
  assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 12), reason="jax 0.12 emits copies as text"
)
@pytest.mark.parametrize("T, Q", [(None, None), (333, 500)])
def test_copies_of_what_is_read_once_carry_a_hint(T, Q, monkeypatch):
  """Where jax emits copies in another way they lose it in silence."""
  constant, values = launch.arith.constant, []

  def noted(kind, value, **more):
    values.append(value)
    return constant(kind, value, **more)

  monkeypatch.setattr(launch.arith, "constant", noted)
  lower(4, T, 24, 6, 128, 16, "bfloat16", max_query_length=Q)
  assert launch._EVICT_FIRST in values


def test_layers_share_one_lowering():
  text = lower(4, None, 32, 8, 128, 16, "bfloat16", layers=6)
  # The first one may differ: its query is an argument.
  assert text.count("stablehlo.custom_call @mosaic_gpu") <= 2


def lower(B, T, N, K, H, p, dtype, *, layers=1, M=40, sinks=False,
          combined=False, batch_invariant=False, shared_prefix=False,
          how=cuda.lower, **static):
  """Returns the StableHLO text, or what else `how` makes of the call."""

  def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype)

  def run(query, pool, table, lengths, starts, sinks):
    plan = None
    if batch_invariant or shared_prefix:
      plan = paged_jax.plan_attention(
        table, lengths, starts, num_heads=N, num_kv_heads=K, head_dim=H,
        page_size=p, dtype=dtype, window=static.get("window"),
        causal=static.get("causal", True), batch_invariant=batch_invariant,
        max_query_length=static.get("max_query_length", 1),
        shared_prefix=shared_prefix, implementation="hopper",
      )
    for layer in range(layers):
      query = paged_jax.paged_attention(
        query, pool, pool, table, lengths, query_starts=starts, sinks=sinks,
        layer=jnp.int32(layer), implementation="hopper", interpret=False,
        plan=plan, **static
      )
    return query

  table = (B, 2, M) if combined else (B, M)
  return how(
    run,
    shape(B if T is None else T, N, H),
    shape(4, 50, K, p, H),
    shape(*table, dtype=jnp.int32),
    shape(B, dtype=jnp.int32),
    None if T is None else shape(B + 1, dtype=jnp.int32),
    shape(N, dtype=jnp.float32) if sinks else None,
  )
