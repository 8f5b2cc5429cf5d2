"""The four stage kernels of one block of paged attention, as pure functions.

    QK: s = q K^T                      matrix unit
    SF: m = max(scale s), P = exp(scale s - m), l = sum(P)   vector unit
    PV: o = P V                        matrix unit
    UP: (m, l, acc) <- (m, l, acc) + (m_j, l_j, o_j)         vector unit

A stage handles all heads of one sequence and `g` blocks at once (g = 1 but for
unrolled graphs). All N query heads share the task; with K KV heads, query head
n reads KV head n // (N / K). Everything but P is float32: P has the dtype of
the inputs, because that is what a matrix unit is fed, and l sums the rounded P,
so that the weights of an output add up to one exactly.

UP merges two partial results, so it also serves as the merge of a split-KV
tree; the last of a sequence divides by l in the same pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

State = tuple[
  Float[Array, "N 1"],  # running maximum
  Float[Array, "N 1"],  # running sum
  Float[Array, "N H"],  # accumulator
]


def qk_matmul(
  query: Float[Array, "N H"], keys: Float[Array, "g K p H"]
) -> Float[Array, "N t"]:
  """Logits s = q K^T of one sequence and g blocks, before scaling.

  Args:
    query: one token, any float dtype.
    keys: tiles of g pages, the dtype of query.

  Returns:
    float32 logits, t = g * p columns in token order.
  """
  blocks, kv_heads, block, head_dim = keys.shape
  heads = query.shape[0]
  s = jnp.einsum(
    "kGh,gkph->kGgp",
    query.reshape(kv_heads, heads // kv_heads, head_dim),
    keys,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return s.reshape(heads, blocks * block)


def softmax_prepare(
  logits: Float[Array, "N t"],
  live: Int[Array, ""],
  *,
  scale: float,
  dtype: jnp.dtype,
) -> tuple[Float[Array, "N t"], Float[Array, "N 1"], Float[Array, "N 1"]]:
  """P = exp(scale s - m) with its row maximum m and row sum l.

  Args:
    logits: float32.
    live: columns that hold tokens, 1 to t; the rest may hold anything.
    scale: of the logits.
    dtype: of P.

  Returns:
    P (0 in dead columns), m and l (both float32).
  """
  column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  s = jnp.where(column < live, logits * scale, -jnp.inf)
  m = s.max(axis=1, keepdims=True)
  p = jnp.exp(s - m).astype(dtype)
  return p, m, p.astype(jnp.float32).sum(axis=1, keepdims=True)


def pv_matmul(
  probabilities: Float[Array, "N t"],
  values: Float[Array, "g K p H"],
  live: Int[Array, ""],
) -> Float[Array, "N H"]:
  """o = P V of one sequence and g blocks, not normalised.

  Args:
    probabilities: P, 0 in dead columns.
    values: tiles of g pages, the dtype of P. Dead slots may hold NaN: they are
      replaced by 0, as 0 * NaN is not 0.
    live: tokens among the t = g * p slots, 1 to t.

  Returns:
    float32 partial output.
  """
  blocks, kv_heads, block, head_dim = values.shape
  heads = probabilities.shape[0]
  slot = jnp.arange(blocks * block).reshape(blocks, 1, block, 1)
  o = jnp.einsum(
    "kGgp,gkph->kGh",
    probabilities.reshape(kv_heads, heads // kv_heads, blocks, block),
    jnp.where(slot < live, values, 0),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return o.reshape(heads, head_dim)


def online_update(state: State, new: State, *, last: bool) -> State:
  """Merges two partial softmax results, and normalises when it is the last.

  With m = max(m_a, m_b) and w_x = exp(m_x - m),

      l = w_a l_a + w_b l_b,   acc = w_a acc_a + w_b acc_b.

  Args:
    state: (m, l, acc); (-inf, 0, 0) is the empty one.
    new: (m, l, acc) of a block or of another chain.
    last: divide acc by l.

  Returns:
    (m, l, acc), float32.

  Source: M. Milakov, N. Gimelshein, Online normalizer calculation for softmax,
  arXiv 1805.02867.
  """
  (m_a, l_a, acc_a), (m_b, l_b, acc_b) = state, new
  m = jnp.maximum(m_a, m_b)
  # Two empty states: -inf - -inf is NaN, while their weights are 0.
  base = jnp.where(jnp.isneginf(m), 0, m)
  w_a, w_b = jnp.exp(m_a - base), jnp.exp(m_b - base)
  l = w_a * l_a + w_b * l_b
  acc = w_a * acc_a + w_b * acc_b
  if last:
    acc = jnp.where(l > 0, acc / jnp.where(l > 0, l, 1), 0)
  return m, l, acc
