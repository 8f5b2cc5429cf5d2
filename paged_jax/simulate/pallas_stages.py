"""The four stage kernels of `stages`, written as Pallas kernels.

Same names, arguments and results. The matrix kernels walk a grid over the KV
heads: program k sees the G query heads of its group and head k of the g pages,
which is what one matrix unit would hold in its local memory. The vector kernels
see all heads at once. They stand for the simulated chip's kernels and run
interpreted, on any backend.
"""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.simulate import stages


def qk_matmul(
  query: Float[Array, "N H"], keys: Float[Array, "g K p H"]
) -> Float[Array, "N t"]:
  """Logits s = q K^T; see `stages.qk_matmul`."""
  blocks, kv_heads, block, head_dim = keys.shape
  heads = query.shape[0]
  group, span = heads // kv_heads, blocks * block

  def kernel(q_ref, k_ref, s_ref):
    k = k_ref[...].reshape(span, head_dim)
    s_ref[...] = _dot(q_ref[...], k, contract=(1, 1))

  s = pl.pallas_call(
    kernel,
    grid=(kv_heads,),
    in_specs=[
      pl.BlockSpec((None, group, head_dim), lambda k: (k, 0, 0)),
      pl.BlockSpec((blocks, None, block, head_dim), lambda k: (0, k, 0, 0)),
    ],
    out_specs=pl.BlockSpec((None, group, span), lambda k: (k, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((kv_heads, group, span), jnp.float32),
    interpret=True,
  )(query.reshape(kv_heads, group, head_dim), keys)
  return s.reshape(heads, span)


def softmax_prepare(
  logits: Float[Array, "N t"],
  live: Int[Array, ""],
  *,
  scale: float,
  dtype: jnp.dtype,
) -> tuple[Float[Array, "N t"], Float[Array, "N 1"], Float[Array, "N 1"]]:
  """P, row maximum and row sum; see `stages.softmax_prepare`."""
  heads, _ = logits.shape

  def kernel(live_ref, s_ref, p_ref, m_ref, l_ref):
    p_ref[...], m_ref[...], l_ref[...] = stages.softmax_prepare(
      s_ref[...], live_ref[0], scale=scale, dtype=dtype
    )

  row = jax.ShapeDtypeStruct((heads, 1), jnp.float32)
  return pl.pallas_call(
    kernel,
    out_shape=(jax.ShapeDtypeStruct(logits.shape, dtype), row, row),
    interpret=True,
  )(jnp.reshape(live, 1), logits)


def pv_matmul(
  probabilities: Float[Array, "N t"],
  values: Float[Array, "g K p H"],
  live: Int[Array, ""],
) -> Float[Array, "N H"]:
  """o = P V, not normalised; see `stages.pv_matmul`."""
  blocks, kv_heads, block, head_dim = values.shape
  heads, span = probabilities.shape
  group = heads // kv_heads

  def kernel(live_ref, p_ref, v_ref, o_ref):
    v = v_ref[...].reshape(span, head_dim)
    slot = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
    v = jnp.where(slot < live_ref[0], v, 0)
    o_ref[...] = _dot(p_ref[...], v, contract=(1, 0))

  o = pl.pallas_call(
    kernel,
    grid=(kv_heads,),
    in_specs=[
      pl.BlockSpec((1,), lambda k: (0,)),
      pl.BlockSpec((None, group, span), lambda k: (k, 0, 0)),
      pl.BlockSpec((blocks, None, block, head_dim), lambda k: (0, k, 0, 0)),
    ],
    out_specs=pl.BlockSpec((None, group, head_dim), lambda k: (k, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((kv_heads, group, head_dim), jnp.float32),
    interpret=True,
  )(
    jnp.reshape(live, 1), probabilities.reshape(kv_heads, group, span), values
  )
  return o.reshape(heads, head_dim)


def online_update(
  state: stages.State, new: stages.State, *, last: bool
) -> stages.State:
  """Merge of two partial results; see `stages.online_update`."""

  def kernel(*refs):
    loaded = [ref[...] for ref in refs[:6]]
    merged = stages.online_update(
      tuple(loaded[:3]), tuple(loaded[3:]), last=last
    )
    for ref, value in zip(refs[6:], merged):
      ref[...] = value

  return pl.pallas_call(
    kernel,
    out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
    interpret=True,
  )(*state, *new)


def _dot(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
  """Float32 product of two tiles over one axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
