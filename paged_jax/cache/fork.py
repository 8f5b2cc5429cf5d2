"""Sharing pages between rows, and copying one before it is written.

    fork: row 1 takes row 0's pages, counts rise    pages[0]  7  2
                                                    pages[1]  7  2
    copy_on_write: row 1 is about to write into     pages[0]  7  2
    page 2, which row 0 reads too: 2 goes to 5      pages[1]  7  5

A step that may write shared pages is
reserve -> copy_on_write -> copy_pages -> slot_mapping -> write_kv -> advance.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged_jax.cache import page_table as page_table_lib
from paged_jax.cache.page_table import PageTable


def fork(
  table: PageTable, parents: Int[Array, "B"]
) -> tuple[PageTable, Bool[Array, "B"]]:
  """Makes each chosen row a copy of its parent that shares the parent's pages.

  Pages that the parent has reserved but not reached stay its own.

  Args:
    table: the table.
    parents: int32 [B]; row b becomes a copy of row parents[b], 0..B-1; B
      leaves row b alone.

  Returns:
    (table, ok): ok [B] is False where row b was not empty (it stays as it
    was) or the parent is no row, or is itself being made; True elsewhere.

  Raises:
    ValueError: parents is not int32 [B].
  """
  B = table.num_sequences
  parents = page_table_lib.per_row("parents", parents, table, jnp.int32)
  asked = parents != B
  parent = jnp.clip(parents, 0, B - 1)
  known = (parents >= 0) & (parents < B) & ~asked[parent]
  empty = (table.capacities == 0) & (table.lengths == 0)
  made = asked & known & empty
  chosen = made.reshape((-1,) + (1,) * (table.pages.ndim - 1))
  p = table.page_size
  written = (table.lengths[parent] + p - 1) // p  # columns that hold tokens
  held = jnp.arange(table.max_pages) < written[:, None]
  held = held.reshape(held.shape[:1] + (1,) * (table.pages.ndim - 2) + (-1,))
  shared = jnp.where(chosen & held, table.pages[parent], table.null)
  return (
    dataclasses.replace(
      table,
      pages=jnp.where(chosen, shared, table.pages),
      lengths=jnp.where(made, table.lengths[parent], table.lengths),
      ref_counts=table.ref_counts.at[shared].add(1, mode="drop"),
    ),
    made | ~asked,
  )


def copy_on_write(
  table: PageTable, num_tokens: Int[Array, "B"]
) -> tuple[
  PageTable, Int[Array, "*kinds B"], Int[Array, "*kinds B"], Bool[Array, "B"]
]:
  """Replaces the shared page that a row is about to write into by a new one.

  Only the page that holds position `lengths[b]` can be shared and written:
  whatever lies beyond it was reserved by the row itself or is full. Rows are
  served in order, without overtaking, as in `reserve`.

  Args:
    table: the table, after `reserve`.
    num_tokens: int32 [B], tokens about to be written; 0 copies nothing.

  Returns:
    (table, sources, targets, ok): page ids [B], or [2, B] for a combined
    table, to give to `copy_pages`; null where nothing is copied. ok [B] is
    False where no free page was left: that row must not write.

  Raises:
    ValueError: num_tokens is not int32 [B].
  """
  num_tokens = page_table_lib.per_row(
    "num_tokens", num_tokens, table, jnp.int32
  )
  B, M, null = table.num_sequences, table.max_pages, table.null
  column = table.lengths // table.page_size
  inside = jnp.minimum(column, M - 1)
  pages = table.pages.reshape(B, -1, M)  # one or two kinds of page
  current = jnp.take_along_axis(pages, inside[:, None, None], axis=2)[..., 0]
  counts = table.ref_counts.at[current].get(mode="fill", fill_value=0)
  partly = (num_tokens > 0) & (column < M)
  shared = partly & (counts > 1).any(axis=1)
  need = current.shape[1] * shared
  served = jnp.cumsum(need)
  ok = ~shared | (served <= table.num_free)
  copied = (shared & ok)[:, None]
  queue, rank = page_table_lib.free_queue(table)
  place = (served - need)[:, None] + jnp.arange(current.shape[1])
  new = queue[jnp.clip(place, 0, table.num_pages - 1)]
  sources = jnp.where(copied, current, null)
  targets = jnp.where(copied, new, null)
  at_column = (jnp.arange(M) == inside[:, None])[:, None]
  pages = jnp.where(copied[..., None] & at_column, new[..., None], pages)
  taken = jnp.sum(jnp.where(ok, need, 0))
  ref_counts = jnp.where(rank < taken, 1, table.ref_counts)
  ref_counts = ref_counts.at[sources].add(-1, mode="drop")
  table = dataclasses.replace(
    table, pages=pages.reshape(table.pages.shape), ref_counts=ref_counts
  )
  if not table.combined:
    return table, sources[:, 0], targets[:, 0], ok
  return table, sources.T, targets.T, ok


def copy_pages(
  pool: Float[Array, "*L P K p H"],
  sources: Int[Array, "B"],
  targets: Int[Array, "B"],
) -> Float[Array, "*L P K p H"]:
  """Copies whole pages inside a pool, in every layer.

  Args:
    pool: [P, K, p, H] or [L, P, K, p, H].
    sources: int32 [B], page ids; null P copies nothing.
    targets: int32 [B], page ids, distinct; null P copies nothing.

  Returns:
    The pool with `pool[..., targets] = pool[..., sources]`.

  Raises:
    ValueError: the pool has another rank, or there are not as many targets as
      sources.
  """
  if pool.ndim not in (4, 5):
    raise ValueError(
      f"pool has shape {pool.shape}: pass [P, K, p, H] or [L, P, K, p, H]"
    )
  if sources.shape != targets.shape:
    raise ValueError(
      f"targets has shape {targets.shape} but sources has {sources.shape}: "
      "each source goes to one target"
    )
  P = pool.shape[-4]
  sources = jnp.minimum(sources, P - 1)
  if pool.ndim == 4:
    return pool.at[targets].set(pool[sources], mode="drop")
  return pool.at[:, targets].set(pool[:, sources], mode="drop")
