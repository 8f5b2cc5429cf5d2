"""The slot writer in Triton: one launch for K and V, in place.

A token's H numbers of one head are a row: contiguous in k [T, K, H], and in the
pool at

    ((layer * P + page) * K + head) * p + offset        slot = page * p + offset

A program moves some consecutive rows of K or of V, as wide loads and stores,
and nothing else: no byte of the pool is read, rows of dropped tokens are
neither read nor written. The pools are both input and output of the kernel (an
alias), so a donated pool is never copied.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops import backend
from paged_jax.ops import triton_tiles as tl

# Rows a program. On an H100 (K = 8, H = 128) 8 to 64 rows are within 0.5 us of
# each other from one token to 8192.
_ROWS = 32


def write(
  pools: tuple[Float[Array, "L P K p H"], ...],
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  slots: Int[Array, "T"] | Int[Array, "2 T"],
  layer: Int[Array, ""],
  *,
  interpret: bool,
) -> tuple[Float[Array, "L P K p H"], ...]:
  """Writes the rows of k and v to their slots of a layer.

  Args:
    pools: that of K and that of V, or one that holds both.
    k: keys in the pool's dtype.
    v: values in the pool's dtype.
    slots: of both, or row 0 of K and row 1 of V.
    layer: 0..L-1; any other one drops all tokens.
    interpret: whether to run the kernel as XLA operations.

  Returns:
    The pools, which take over the memory of the old ones.

  Raises:
    NotImplementedError: float64, no token, or more rows than an int32 counts.
  """
  shape, dtype = pools[0].shape, pools[0].dtype
  num_tokens, num_kv_heads, head_dim = k.shape
  num_rows = math.prod(shape[:-1])
  rows = num_tokens * num_kv_heads
  if dtype == jnp.float64:
    raise NotImplementedError("float64: use implementation='xla'")
  if num_rows >= 2**31:
    raise NotImplementedError(
      f"k_pages holds {num_rows} rows of H: row ids are int32; use fewer "
      "pages or layers a pool"
    )
  if not rows:
    raise NotImplementedError("no tokens: there is nothing to launch")
  paired = slots.ndim == 2

  def kernel(k_ref, v_ref, slots_ref, layer_ref, *targets):
    targets = targets[len(pools) :]  # the outputs
    # Read here: the interpreter knows no program_id inside of `when`.
    first, which = pl.program_id(0) * _ROWS, pl.program_id(1)
    row = first + jnp.arange(_ROWS, dtype=jnp.int32)
    token, head = _divide(row, num_kv_heads)
    of_pair = which * num_tokens if paired else 0
    slot = backend.load(slots_ref.at[of_pair + token], token < num_tokens, -1)
    to, real = _place(shape, layer_ref[0], slot, head)
    for i, (source, target) in enumerate(
      ((k_ref, targets[0]), (v_ref, targets[-1]))
    ):
      pl.when(which == i)(
        functools.partial(_move, source, target, row, to, real)
      )

  flat = tuple(pool.reshape(num_rows, head_dim) for pool in pools)
  out = backend.triton_call(
    kernel,
    name="write_kv",
    grid=(-(-rows // _ROWS), 2),
    out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in flat],
    num_warps=4,
    num_stages=1,
    interpret=interpret,
    aliases={4 + i: i for i in range(len(flat))},
  )(
    k.reshape(rows, head_dim),
    v.reshape(rows, head_dim),
    slots.reshape(-1),
    layer.reshape(1),
    *flat,
  )
  return tuple(x.reshape(shape) for x in out)


def _place(shape, layer, slot, head):
  """Returns the rows of the pool that slots stand for, and which are real."""
  num_layers, num_pages, num_kv_heads, page_size, _ = shape
  real = (slot >= 0) & (slot < num_pages * page_size)
  real &= (layer >= 0) & (layer < num_layers)
  page, offset = _divide(slot, page_size)
  page = (layer * num_pages + page) * num_kv_heads + head
  return page * page_size + offset, real


def _move(source, target, row, to, real):
  """Copies rows of `source` to rows of `target`, where real."""
  num_rows, head_dim = target.shape
  column = jnp.arange(tl.padded(head_dim), dtype=jnp.int32)[None]
  mask = jnp.broadcast_to(real[:, None], (row.shape[0], column.shape[1]))
  if column.shape[1] != head_dim:
    mask &= column < head_dim
  values = backend.load(source.at[row[:, None], column], mask)
  to = jnp.where(real, to, num_rows)[:, None]  # see backend.store
  backend.store(target.at[to, column], values, mask)


def _divide(x, by):
  """Returns (quotient, remainder); of negative x, which is masked, anything."""
  quotient = lax.div(x, jnp.int32(by))
  return quotient, x - quotient * by
