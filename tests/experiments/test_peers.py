"""Peers of the benchmark: what they refuse, and what fa3 is handed."""

import dataclasses
import sys
import types

import jax
from jax._src.cudnn import fused_attention_stablehlo as fused
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import peers, programs, shapes
from experiments.common import problem as problem_lib

_SHAPE = shapes.Shape(
  name="t", phase="prefill", batch=3, num_heads=4, num_kv_heads=2,
  head_dim=128, page_size=4, context=23, distribution="ragged",
  query_tokens=5, dtype="bfloat16",
)


def _dense(q, k, v, window):
  """Bottom-right causal attention of one row; window as the package has it."""
  N, K, n, S = q.shape[1], k.shape[1], q.shape[0], k.shape[0]
  k, v = (jnp.repeat(x.astype(jnp.float32), N // K, 1) for x in (k, v))
  logits = jnp.einsum("qnh,snh->nqs", q.astype(jnp.float32), k)
  at = np.arange(n)[:, None] + S - n
  seen = np.arange(S) <= at
  if window[0] >= 0:
    seen &= np.arange(S) >= at - window[0]
  p = jax.nn.softmax(jnp.where(seen, logits / q.shape[2] ** 0.5, -jnp.inf))
  # Like the kernels: a NaN where nothing is seen spoils the sum.
  return jnp.einsum("nqs,snh->qnh", p, v).astype(q.dtype)


def _package(shape):
  """The two entries of flash-attn3-jax, by its documentation."""
  starts = shape.query_starts

  def kvcache(q, k_cache, v_cache, *, cache_seqlens, page_table, num_splits,
              is_causal, window_size):
    assert is_causal and num_splits >= 1
    del cache_seqlens  # traced: the shape knows them
    rows = []
    for b, n in enumerate(shape.lengths):
      k, v = (
        x[page_table[b]].reshape(-1, *x.shape[2:]) for x in (k_cache, v_cache)
      )
      # Dead slots take part with probability 0.
      rows.append(_dense(q[b], k[:n], v[:n], window_size) + 0 * v[n:].sum())
    return jnp.stack(rows)

  def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
             max_seqlen_k, is_causal, window_size):
    assert is_causal and max_seqlen_q == shape.query_lengths.max()
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    assert max_seqlen_k == shape.lengths.max()
    ends = shape.lengths.cumsum()
    return jnp.concatenate([
      _dense(q[starts[b] : starts[b + 1]], k[end - n : end], v[end - n : end],
             window_size)
      for b, (end, n) in enumerate(zip(ends, shape.lengths))
    ])

  return types.SimpleNamespace(
    flash_mha_with_kvcache=kvcache, flash_mha_varlen=varlen
  )


def _check(name, problem, state):
  """Holds a peer, as it was handed `state`, against the reference."""
  attend = peers.prepare(name, problem.shape)(state)
  right = programs.ours(problem.shape, "reference")(problem.state)
  for layer in range(2):
    got, want = attend(problem.query, layer), right(problem.query, layer)
    np.testing.assert_allclose(
      got.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2
    )


@pytest.mark.parametrize(
  "changes, paged",
  [
    (dict(), True),
    (dict(window=6), True),
    (dict(phase="decode", query_tokens=1), True),
    (dict(query_tokens=0), False),
    (dict(query_tokens=0, window=6), False),
    (dict(phase="mixed", runs=((1, 23, 9), (2, 14, 1))), False),
  ],
)
def test_fa3_is_handed_the_right_problem(changes, paged, monkeypatch):
  shape = dataclasses.replace(_SHAPE, **changes)
  source = problem_lib.RandomSource(0)
  problem = problem_lib.build(shape, layers=2, source=source)
  monkeypatch.setitem(sys.modules, "flash_attn3_jax", _package(shape))
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    state = peers.state("fa3", problem, source, 2)
  assert ("table" in state) == paged
  _check("fa3", problem, state)


@pytest.mark.parametrize("distribution", ["const", "ragged"])
def test_cudnn_paged_is_handed_the_right_problem(distribution, monkeypatch):
  shape = dataclasses.replace(
    _SHAPE, phase="decode", query_tokens=1, distribution=distribution
  )

  def paged_attention(query, key, value, q_seqlen, kv_seqlen, page_table_k,
                      page_table_v, *, scale, mask_type, qkv_layout):
    """What its docstring says, with a check of JAX's own."""
    fused.check_layout(
      query, key, value, None, q_seqlen, kv_seqlen, None, None, page_table_k,
      page_table_v, fused._normalize_layout(qkv_layout),
    )
    assert mask_type == fused.MaskType.PADDING and (q_seqlen == 1).all()
    assert scale == shape.head_dim**-0.5
    rows = []
    for b, n in enumerate(shape.lengths):
      k, v = (
        x[table[b, 0, :, 0]].swapaxes(1, 2).reshape(-1, *x.shape[1::2])
        for x, table in ((key, page_table_k), (value, page_table_v))
      )
      rows.append(_dense(query[b].swapaxes(0, 1), k[:n], v[:n], (-1, -1)))
    return jnp.stack(rows).swapaxes(1, 2)

  monkeypatch.setattr(fused, "paged_attention", paged_attention)
  problem = problem_lib.build(
    shape, layers=2, source=problem_lib.RandomSource(0)
  )
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: "gpu")
    state = peers.state("cudnn_paged", problem, None, 2)
  _check("cudnn_paged", problem, state)


@pytest.mark.parametrize(
  "name, changes, reason",
  [
    ("fa3", dict(head_dim=64), "H 64"),
    ("fa3", dict(sinks=True), "sinks"),
    ("fa3", dict(soft_cap=30.0), "a soft cap"),
    ("fa3", dict(dtype="float32"), "float32"),
    ("fa3", dict(), "needs the package flash-attn3-jax"),
    ("cudnn", dict(), "part of a prompt"),
    ("cudnn_paged", dict(), "prefill"),
    ("cudnn_paged", dict(shared_prefix=8), "shared pages"),
    ("dense", dict(query_tokens=0, window=6), "a window"),
    ("jax_pallas", dict(), "prefill"),
  ],
)
def test_refusals_say_why(name, changes, reason, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setitem(sys.modules, "flash_attn3_jax", None)
  problem = types.SimpleNamespace(shape=dataclasses.replace(_SHAPE, **changes))
  with pytest.raises(NotImplementedError, match=reason):
    peers.state(name, problem, problem_lib.RandomSource(0), 1)


@pytest.mark.parametrize("name", sorted({*peers.NAMES} - {"dense"}))
def test_a_gpu_is_needed(name):
  problem = types.SimpleNamespace(
    shape=dataclasses.replace(_SHAPE, phase="decode", query_tokens=1)
  )
  with pytest.raises(NotImplementedError, match="a CPU"):
    peers.state(name, problem, problem_lib.RandomSource(0), 1)


@pytest.mark.parametrize(
  "name, splits",
  [
    ("llama3-8b_dec_b1_c1024_p16_const", 8),  # no more than blocks of keys
    ("llama3-8b_dec_b64_c8192_p16_const", 15),
    ("llama3-8b_pre_b4_c4096_p16_qfull_const", 1),
  ],
)
def test_fa3_splits(name, splits):
  assert peers._fa3_splits(shapes.named()[name]) == splits
