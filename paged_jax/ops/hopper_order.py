"""A row's pages in the order in which they lie in memory.

What a decoding token attends to is a set: its pages may be read in any order.
DRAM answers sooner where those that ask at a time ask near each other, and CTAs
that all walk from low page ids to high ones do:

    table    9 2 7 4 | 1 3 5 8 | 6          read as it is: anywhere in the pool
    sorted   2 4 7 9 | 1 3 5 8 | 6          read so: a sweep over it

(rows of 4, 4 and 1 pages). Only pages that every query token of the row sees
whole change places; those that hold the end of a sequence, its query tokens or
the edge of a window stay, so that positions keep their meaning.

The price, besides a sort a step: sums are taken in another order, so that the
last bits of an output depend on where its pages lie.
"""

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.ops.plan import Geometry

_LAST = jnp.iinfo(jnp.int32).max


def in_memory_order(
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None,
  geometry: Geometry,
) -> tuple[Int[Array, "B M"], ...]:
  """Returns K's table, and V's if it has its own, sorted by K's page ids.

  Args:
    page_table: int32 [B, M] or [B, 2, M].
    lengths: int32 [B], KV tokens of each sequence.
    query_starts: int32 [B+1], or None for one query token a sequence.
    geometry: static facts of the call.
  """
  p, M = geometry.page_size, page_table.shape[-1]
  tables = (page_table,)
  if geometry.combined:
    tables = page_table[:, 0], page_table[:, 1]
  queries = 1 if query_starts is None else query_starts[1:] - query_starts[:-1]
  # Positions that all of a row's query tokens see, the last token's window and
  # the first one's causal limit.
  first, stop = jnp.zeros_like(lengths), lengths
  if geometry.causal:
    stop = lengths - queries + 1
  if geometry.window is not None:
    first = jnp.maximum(lengths - geometry.window, 0)
  page = jnp.arange(M, dtype=jnp.int32)
  before = page * p < first[:, None]
  moves = jnp.logical_not(before) & ((page + 1) * p <= stop[:, None])
  # Those that stay are smaller or larger than all ids, in their order.
  key = jnp.where(before, page - M, page + (_LAST - M))
  key = jnp.where(moves, tables[0], key)
  found = lax.sort(
    (key, *tables[1:]), dimension=1, num_keys=1, is_stable=False
  )
  return tuple(
    jnp.where(moves, new, old) for new, old in zip(found, tables, strict=True)
  )
