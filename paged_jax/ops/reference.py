"""Paged attention written down: gather, dense softmax, no tricks.

The oracle of every test. It gathers a row's whole cache `[M*p, K, H]` (the
only implementation that does), and walks the row's queries in blocks, so that
16k queries over 16k keys fit:

    logits = scale * q . k       capped: cap * tanh(logits / cap)
    seen   = position < length, and causal: position <= q's, window: > q's - w
    out    = sum(exp(logits - m) v) / (sum(exp(logits - m)) + exp(sink - m))
    lse    = m + log(denominator)

In float32, or in float64 for float64 inputs. Dead slots are replaced by zeros
before they meet any arithmetic, since 0 * NaN is NaN.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops.inputs import Inputs

_QUERY_BLOCK = 128  # rows a block; bounds the logits to [N, 128, M*p]


def attend(
  inputs: Inputs, *, plan: object = None, interpret: bool = False
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token."""
  del plan, interpret  # Plain jnp: nothing to plan, nothing to interpret.
  T, N, H = inputs.query.shape
  dtype, block = inputs.accumulator_dtype, min(_QUERY_BLOCK, max(T, 1))
  K, G = inputs.num_kv_heads, inputs.group_size
  query = jnp.pad(inputs.query.astype(dtype), ((0, block), (0, 0), (0, 0)))
  out = jnp.zeros((T + block, N, H), dtype)
  lse = jnp.full((T + block, N), -jnp.inf, dtype)
  positions = jnp.arange(inputs.max_pages * inputs.page_size)

  def gather(pool, pages, live):  # -> [K, M*p, H], dead slots zero
    tokens = pool[inputs.layer, jnp.minimum(pages, inputs.num_pages - 1)]
    tokens = tokens.swapaxes(0, 1).reshape(K, -1, H).astype(dtype)
    return jnp.where(live[:, None], tokens, 0)

  def one_sequence(b, carry):
    start, end = inputs.query_starts[b], inputs.query_starts[b + 1]
    length = inputs.lengths[b]
    live = positions < length
    if inputs.window is not None:  # slots before the first window are dead
      live &= positions > length - (end - start) - inputs.window
    k = gather(inputs.k_pages, inputs.k_table[b], live)
    v = gather(inputs.v_pages, inputs.v_table[b], live)

    def one_block(i, carry):
      out, lse = carry
      first = start + i * block
      rows = first + jnp.arange(block)
      at = (length - (end - rows))[:, None]  # the queries' own positions
      seen = live & (at >= 0)
      if inputs.causal:
        seen &= positions <= at
      if inputs.window is not None:
        seen &= positions > at - inputs.window
      q = lax.dynamic_slice_in_dim(query, first, block)
      o, s = _softmax(q.reshape(block, K, G, H), k, v, seen, inputs)
      mine = (rows < end)[:, None]  # a block's tail belongs to the next row
      o = jnp.where(mine[..., None], o, lax.dynamic_slice_in_dim(out, first,
                                                                 block))
      s = jnp.where(mine, s, lax.dynamic_slice_in_dim(lse, first, block))
      out = lax.dynamic_update_slice_in_dim(out, o, first, 0)
      return out, lax.dynamic_update_slice_in_dim(lse, s, first, 0)

    blocks = (end - start + block - 1) // block
    return lax.fori_loop(0, blocks, one_block, carry)

  out, lse = lax.fori_loop(0, inputs.num_sequences, one_sequence, (out, lse))
  return out[:T].astype(inputs.query.dtype), lse[:T]


def _softmax(q, k, v, seen, inputs):
  """q [block, K, G, H], k and v [K, M*p, H] -> [block, N, H], [block, N]."""
  with jax.default_matmul_precision("highest"):
    logits = inputs.scale * jnp.einsum("tkgh,ksh->tkgs", q, k)
    if inputs.soft_cap is not None:
      logits = inputs.soft_cap * jnp.tanh(logits / inputs.soft_cap)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    sink = jnp.full((inputs.num_heads,), -jnp.inf, logits.dtype)
    if inputs.sinks is not None:
      sink = inputs.sinks.astype(logits.dtype)
    sink = sink.reshape(q.shape[1:3])
    m = jnp.maximum(logits.max(axis=-1), sink)
    m = jnp.where(jnp.isneginf(m), 0, m)
    weights = jnp.exp(logits - m[..., None])
    total = weights.sum(axis=-1) + jnp.exp(sink - m)
    out = jnp.einsum("tkgs,ksh->tkgh", weights, v)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    lse = m + jnp.log(total)
  rows = q.shape[0]
  return out.reshape(rows, -1, q.shape[-1]), lse.reshape(rows, -1)
