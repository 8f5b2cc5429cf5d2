"""Attention from elsewhere in JAX, on the same tokens, as a yardstick.

    dense       jax.nn.dot_product_attention, XLA, a contiguous cache per row
    cudnn       the same through cuDNN (NVIDIA GPU, half precision)
    jax_pallas  jax.experimental.pallas.ops.gpu.paged_attention, deprecated,
                decode only

Each gets the layout it likes best; building that is not timed. None of them
survives NaN in dead slots, so theirs are zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import problem as problem_lib
from experiments.common import programs, shapes

NAMES = ("dense", "cudnn", "jax_pallas")
_SPLITS = 16  # of jax_pallas: table widths must divide evenly


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
  make = _jax_pallas if name == "jax_pallas" else _dense

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


def _check(name, shape):
  reasons = {
    "sinks": shape.sinks,
    "a window": shape.window is not None,
    "a soft cap": shape.soft_cap is not None and name != "jax_pallas",
    "prefill": not shape.decode and name == "jax_pallas",
    "part of a prompt": not shape.decode and shape.query_tokens != 0,
    "rows that differ in new tokens": bool(shape.runs),
    "a CPU": jax.default_backend() == "cpu" and name != "dense",
    "float32": shape.dtype == "float32" and name == "cudnn",
  }
  for what, refused in reasons.items():
    if refused:
      raise NotImplementedError(f"{name} cannot do {what}")


def _home(shape):
  """Returns where packed query rows lie in [B * context]."""
  return np.concatenate([
    b * shape.context + np.arange(n) for b, n in enumerate(shape.lengths)
  ])


def _heads_first(pool):  # [P, K, p, H] -> [K, P, p, H]
  return jnp.nan_to_num(pool.swapaxes(0, 1), nan=0.0)


def _contiguous(tokens, shape):  # [S, K, H] -> [B, context, K, H]
  cache = jnp.zeros((shape.batch * shape.context, *tokens.shape[1:]),
                    tokens.dtype)
  cache = cache.at[_home(shape)].set(tokens)
  return cache.reshape(shape.batch, shape.context, *tokens.shape[1:])
