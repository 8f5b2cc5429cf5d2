"""Attention from elsewhere in JAX, on the same tokens, as a yardstick.

    dense       jax.nn.dot_product_attention, XLA, a contiguous cache per row
    cudnn       the same through cuDNN (NVIDIA GPU, half precision)
    cudnn_paged cuDNN's paged attention, which JAX has but does not offer (a
                private function), decode only. It wants a pool of exactly B * M
                pages, [B * M, K, p, H] a layer: none free, none shared
    jax_pallas  jax.experimental.pallas.ops.gpu.paged_attention, deprecated,
                decode only
    fa3         FlashAttention-3 of the optional package flash-attn3-jax (0.2.3;
                `pip install flash-attn3-jax`), Hopper GPUs, half precision.
                Paged, [P, p, K, H] a layer, where every row has as many new
                tokens: decode, chunks, equal prompts. Its paged entry knows no
                ragged queries: those get packed, contiguous keys and values

Each gets the layout it likes best; building that is not timed. None of them
survives NaN in dead slots, so theirs are zero.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import problem as problem_lib
from experiments.common import programs, shapes

NAMES = ("dense", "cudnn", "cudnn_paged", "jax_pallas", "fa3")
_SPLITS = 16  # of jax_pallas: table widths must divide evenly
_FA3_HEAD_DIM = 128  # the only one that the wheels of flash-attn3-jax hold


def state(
  name: str,
  problem: problem_lib.Problem,
  source: problem_lib.Source,
  layers: int,
) -> Any:
  """Returns what `prepare(name, ...)` takes: a list of layers and lengths."""
  _check(name, problem.shape)
  if name == "jax_pallas":
    pools = [
      (_heads_first(problem.k_pages[i]), _heads_first(problem.v_pages[i]))
      for i in range(layers)
    ]
    table = np.asarray(problem.page_table)
    table = np.where(table < problem.k_pages.shape[1], table, 0)
    unit = _SPLITS * (8 if table.shape[1] >= 8 * _SPLITS else 1)
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % unit)))
    return dict(
      layers=pools, table=jnp.asarray(table), lengths=problem.lengths
    )
  if name == "cudnn_paged":
    return _full_pools(problem, layers)
  if name == "fa3":
    return _fa3_state(problem, source, layers)
  caches = [
    tuple(
      _contiguous(x, problem.shape)
      for x in problem_lib.tokens(problem.shape, source, layer)
    )
    for layer in range(layers)
  ]
  return dict(layers=caches, lengths=problem.lengths)


def prepare(
  name: str, shape: shapes.Shape
) -> Callable[[Any], programs.Attend]:
  """Returns state -> attend, as `programs.chain` wants it."""
  makers = dict(jax_pallas=_jax_pallas, fa3=_fa3, cudnn_paged=_cudnn_paged)
  make = makers.get(name, _dense)

  def prepared(state):
    return make(name, shape, state)

  return prepared


def _dense(name, shape, state):
  S, B = shape.context, shape.batch
  full = shape.distribution == "const"
  rows = 1 if shape.decode else S
  implementation = "cudnn" if name == "cudnn" else "xla"
  # Lengths cost a mask: none where every row is full.
  lengths = None if full else state["lengths"]
  home = _home(shape) if rows > 1 and not full else None

  def attend(query, layer):
    k, v = state["layers"][layer]
    if home is None:
      q = query.reshape(B, rows, *query.shape[1:])
    else:
      q = jnp.zeros((B * S, *query.shape[1:]), query.dtype)
      q = q.at[home].set(query).reshape(B, S, *query.shape[1:])
    out = jax.nn.dot_product_attention(
      q, k, v,
      is_causal=rows > 1,
      query_seq_lengths=lengths if rows > 1 else None,
      key_value_seq_lengths=lengths,
      local_window_size=None,
      implementation=implementation,
    )
    out = out.reshape(-1, *query.shape[1:])
    return out if home is None else out[home]

  return attend


def _jax_pallas(name, shape, state):
  del name
  from jax.experimental.pallas.ops.gpu import paged_attention  # deprecated

  scale = shape.head_dim**-0.5

  def attend(query, layer):
    k, v = state["layers"][layer]
    # It knows no scale; one elementwise kernel a layer is its price.
    return paged_attention.paged_attention(
      query * jnp.asarray(scale, query.dtype),
      k, v, state["table"], state["lengths"],
      k_splits=_SPLITS,
      attn_logits_soft_cap=shape.soft_cap,
    )

  return attend


def _full_pools(problem, layers):
  """Every row has M pages of its own, anywhere; the last ones may be zeros."""
  old = np.asarray(problem.page_table)
  new = np.random.default_rng(0).permutation(old.size).reshape(old.shape)
  used = old < problem.k_pages.shape[1]
  to, source = jnp.asarray(new[used]), jnp.asarray(old[used])

  def moved(pool):
    pages = jnp.zeros((old.size, *pool.shape[1:]), pool.dtype)
    return jnp.nan_to_num(pages.at[to].set(pool[source]), nan=0.0)

  return dict(
    layers=[
      (moved(problem.k_pages[i]), moved(problem.v_pages[i]))
      for i in range(layers)
    ],
    table=jnp.asarray(new[:, None, :, None], jnp.int32),
    lengths=problem.lengths,
  )


def _cudnn_paged(name, shape, state):
  del name
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  ones = jnp.ones_like(state["lengths"])

  def attend(query, layer):
    k, v = state["layers"][layer]
    out = cudnn.paged_attention(
      query[:, :, None], k, v, ones, state["lengths"],
      state["table"], state["table"],
      scale=shape.head_dim**-0.5,
      mask_type=cudnn.MaskType.PADDING,
      qkv_layout="BNTH",
    )
    return out[:, :, 0]

  return attend


def _fa3_state(problem, source, layers):
  shape = problem.shape
  state = dict(lengths=problem.lengths)
  if _fa3_paged(shape):
    pools = (problem.k_pages, problem.v_pages)
    state["layers"] = [
      tuple(_tokens_first(pool[i]) for pool in pools) for i in range(layers)
    ]
    table = problem.page_table
    state["table"] = jnp.where(table < problem.k_pages.shape[1], table, 0)
  else:
    state["layers"] = [
      problem_lib.tokens(shape, source, i) for i in range(layers)
    ]
    state["query_starts"] = problem.query_starts
    starts = np.cumulative_sum(shape.lengths, include_initial=True)
    state["starts"] = jnp.asarray(starts, jnp.int32)
  return state


def _fa3(name, shape, state):
  del name
  fa3 = _fa3_package()
  # Both entries align the causal mask at the bottom right, as we do, and count
  # the neighbours in a window where we count the token too.
  window = (-1, -1) if shape.window is None else (shape.window - 1, 0)
  options = dict(is_causal=True, window_size=window)

  def paged(query, layer):
    k, v = state["layers"][layer]
    out = fa3.flash_mha_with_kvcache(
      query.reshape(shape.batch, -1, *query.shape[1:]), k, v,
      cache_seqlens=state["lengths"],
      page_table=state["table"],
      num_splits=_fa3_splits(shape),
      **options,
    )
    return out.reshape(query.shape)

  def packed(query, layer):
    k, v = state["layers"][layer]
    return fa3.flash_mha_varlen(
      query, k, v,
      cu_seqlens_q=state["query_starts"],
      cu_seqlens_k=state["starts"],
      max_seqlen_q=int(shape.query_lengths.max()),
      max_seqlen_k=int(shape.lengths.max()),
      **options,
    )

  return paged if _fa3_paged(shape) else packed


def _fa3_paged(shape):
  return len(set(shape.query_lengths.tolist())) == 1


def _fa3_splits(shape):
  """Returns an upper bound of the splits of a row; the kernel picks fewer.

  As many as fill a GPU of 132 SMs to 85 % with one row: the bound that
  FlashAttention-3 works out where it is called from PyTorch. The JAX package
  leaves it to the caller.
  """
  rows = int(shape.query_lengths.max()) * shape.group_size
  tiles = shape.num_kv_heads * math.ceil(rows / 128)
  seen = shape.context
  if shape.window is not None:
    seen = min(seen, shape.window + 128)
  blocks = math.ceil(seen / 128)
  if tiles >= 0.8 * 132 or blocks <= 4:
    return 1
  return min(math.ceil(0.85 * 132 / tiles), blocks)


def _fa3_package():
  try:
    import flash_attn3_jax  # optional; nothing else needs it
  except (ImportError, AttributeError) as error:  # or it and JAX do not match
    raise NotImplementedError(
      f"fa3 needs the package flash-attn3-jax: {error}"
    ) from error
  return flash_attn3_jax


def _check(name, shape):
  fa3, half = name == "fa3", ("cudnn", "cudnn_paged", "fa3")
  chunk = not shape.decode and shape.query_tokens != 0
  reasons = {
    "sinks": shape.sinks,
    "a window": shape.window is not None and not fa3,
    "shared pages": shape.shared_prefix > 0 and name == "cudnn_paged",
    "a soft cap": shape.soft_cap is not None and name != "jax_pallas",
    "prefill": not shape.decode and name in ("jax_pallas", "cudnn_paged"),
    "part of a prompt": chunk and not fa3,
    "rows that differ in new tokens": bool(shape.runs) and not fa3,
    f"H {shape.head_dim}": fa3 and shape.head_dim != _FA3_HEAD_DIM,
    "float32": shape.dtype == "float32" and name in half,
    "a CPU": jax.default_backend() == "cpu" and name != "dense",
  }
  for what, refused in reasons.items():
    if refused:
      raise NotImplementedError(f"{name} cannot do {what}")
  if fa3:
    _fa3_package()


def _home(shape):
  """Returns where packed query rows lie in [B * context]."""
  return np.concatenate([
    b * shape.context + np.arange(n) for b, n in enumerate(shape.lengths)
  ])


def _heads_first(pool):  # [P, K, p, H] -> [K, P, p, H]
  return jnp.nan_to_num(pool.swapaxes(0, 1), nan=0.0)


def _tokens_first(pool):  # [P, K, p, H] -> [P, p, K, H]
  return jnp.nan_to_num(pool.swapaxes(1, 2), nan=0.0)


def _contiguous(tokens, shape):  # [S, K, H] -> [B, context, K, H]
  cache = jnp.zeros((shape.batch * shape.context, *tokens.shape[1:]),
                    tokens.dtype)
  cache = cache.at[_home(shape)].set(tokens)
  return cache.reshape(shape.batch, shape.context, *tokens.shape[1:])
