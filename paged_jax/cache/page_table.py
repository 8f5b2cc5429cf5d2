"""The page table: which pages of the pool hold which tokens of a sequence.

    sequence b:  tokens   0 1 2 3 | 4 5 6 7 | 8 9        page size p = 4
    pages[b]:                7    |    2    |  9   null  null = P
    slot of token 6:     pages[b, 6 // 4] * 4 + 6 % 4 = 2 * 4 + 2 = 10

The state is one frozen pytree; every function is pure, vectorised over rows
and pages, and compiles once for all contents. One step of an engine is
reserve -> slot_mapping -> write_kv -> advance -> paged_attention.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTable:
  """Pages of B sequences in a pool of P pages.

  Every page is free (reference count 0) or owned; its count is the number of
  table entries that name it. A row's entries are a prefix: pages, then nulls.
  """

  pages: Int[Array, "B M"] | Int[Array, "B 2 M"]  # page ids; null = P
  lengths: Int[Array, "B"]  # tokens written
  ref_counts: Int[Array, "P"]  # entries naming the page; 0 = free
  page_size: int = dataclasses.field(metadata=dict(static=True))  # p, tokens

  @property
  def num_pages(self) -> int:  # P
    return self.ref_counts.shape[-1]

  @property
  def num_sequences(self) -> int:  # B
    return self.pages.shape[0]

  @property
  def max_pages(self) -> int:  # M
    return self.pages.shape[-1]

  @property
  def combined(self) -> bool:
    """Whether K and V have pages of their own (`pages` is [B, 2, M])."""
    return self.pages.ndim == 3

  @property
  def null(self) -> int:
    """The null page id: positive and out of range, so that scatters drop it."""
    return self.num_pages

  @property
  def num_free(self) -> Int[Array, ""]:
    return jnp.sum(self.ref_counts == 0, dtype=jnp.int32)

  @property
  def capacities(self) -> Int[Array, "B"]:
    """Tokens that each row's reserved pages can hold."""
    row = self.pages[:, 0] if self.combined else self.pages
    owned = jnp.sum(row != self.null, axis=-1, dtype=jnp.int32)
    return owned * self.page_size


def create_page_table(
  *,
  num_pages: int,
  page_size: int,
  num_sequences: int,
  max_pages: int,
  combined: bool = False,
) -> PageTable:
  """Returns an empty table: all pages free, all rows empty.

  Args:
    num_pages: P, pages in the pool; may be below num_sequences * max_pages.
    page_size: p, tokens a page.
    num_sequences: B, rows.
    max_pages: M, the most pages a row can have.
    combined: whether K and V get different pages, pages [B, 2, M].

  Returns:
    The table.

  Raises:
    ValueError: a size is not a positive int, or P * p slots exceed int32.
  """
  sizes = dict(
    num_pages=num_pages,
    page_size=page_size,
    num_sequences=num_sequences,
    max_pages=max_pages,
  )
  for name, size in sizes.items():
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f"{name} is {size!r}: pass an int of at least 1")
  for name, tokens in (
    ("num_pages", num_pages * page_size),
    ("max_pages", max_pages * page_size),
  ):
    if tokens >= 2**31:
      raise ValueError(
        f"{name} is {sizes[name]} of page_size {page_size}, {tokens} tokens: "
        "positions and slots are int32; use fewer pages"
      )
  rows = (num_sequences, 2) if combined else (num_sequences,)
  return PageTable(
    pages=jnp.full((*rows, max_pages), num_pages, jnp.int32),
    lengths=jnp.zeros((num_sequences,), jnp.int32),
    ref_counts=jnp.zeros((num_pages,), jnp.int32),
    page_size=page_size,
  )


def reserve(
  table: PageTable, num_tokens: Int[Array, "B"]
) -> tuple[PageTable, Bool[Array, "B"]]:
  """Gives each row the pages that `lengths + num_tokens` tokens need.

  First come, first served, without overtaking: a row gets its pages when the
  free ones cover its need and that of all rows before it. Rows that would
  outgrow their M pages (or ask for a negative number) fail and count for
  nothing; rows that need no page succeed. A failing row stays as it was.

  Args:
    table: the table.
    num_tokens: int32 [B], tokens about to be written.

  Returns:
    (table, ok): ok [B], whether the row can hold its tokens.

  Raises:
    ValueError: num_tokens is not int32 [B].
  """
  num_tokens = per_row("num_tokens", num_tokens, table, jnp.int32)
  p, P, M = table.page_size, table.num_pages, table.max_pages
  have = table.capacities // p
  fits = (num_tokens >= 0) & (num_tokens <= M * p - table.lengths)
  tokens = table.lengths + jnp.where(fits, num_tokens, 0)
  columns = jnp.maximum((tokens + p - 1) // p - have, 0)  # new columns a row
  kinds = 2 if table.combined else 1  # a column is one page, or one K, one V
  need = kinds * columns
  served = jnp.cumsum(need)
  ok = fits & ((need == 0) | (served <= table.num_free))
  granted = jnp.where(ok, columns, 0)

  queue, rank = free_queue(table)
  column = jnp.arange(M) - have[:, None]  # 0 at a row's first null
  new = (column >= 0) & (column < granted[:, None])
  place = (served - need)[:, None] + kinds * column
  if table.combined:
    new = new[:, None]
    place = place[:, None] + jnp.arange(2)[:, None]
  pages = jnp.where(new, queue[jnp.clip(place, 0, P - 1)], table.pages)
  taken = jnp.sum(kinds * granted)
  ref_counts = jnp.where(rank < taken, 1, table.ref_counts)
  return (
    dataclasses.replace(table, pages=pages, ref_counts=ref_counts),
    ok,
  )


def slot_mapping(
  table: PageTable, num_tokens: Int[Array, "B"], total: int
) -> Int[Array, "total"] | Int[Array, "2 total"]:
  """Returns the slot of every new token, rows packed one after another.

  Token j of row b is packed at `sum(num_tokens[:b]) + j` and goes to position
  `lengths[b] + j`, slot `pages[b, position // p] * p + position % p`. A row
  whose tokens exceed its reserved pages gets null slots only; the packing of
  the others does not change.

  Args:
    table: the table, before `advance`.
    num_tokens: int32 [B], new tokens a row; negative counts as 0.
    total: T, static length of the result; beyond the packed tokens it is null.

  Returns:
    int32 [total], or [2, total] (K, V) for a combined table; null = P * p.

  Raises:
    ValueError: num_tokens is not int32 [B], or total is not a positive int.
  """
  num_tokens = per_row("num_tokens", num_tokens, table, jnp.int32)
  if isinstance(total, bool) or not isinstance(total, int) or total < 1:
    raise ValueError(
      f"total is {total!r}: pass the static number of packed tokens, an int "
      "of at least 1"
    )
  p, B = table.page_size, table.num_sequences
  held = num_tokens <= table.capacities - table.lengths
  # A row longer than `total` fills it: clipping keeps the sum within int32.
  counts = jnp.clip(num_tokens, 0, total)
  ends = jnp.cumsum(counts)
  token = jnp.arange(total, dtype=jnp.int32)
  # Row of a packed token = number of rows that end at or before it.
  ended = jnp.zeros((total,), jnp.int32).at[ends].add(1, mode="drop")
  row = jnp.cumsum(ended)
  live = row < B
  row = jnp.minimum(row, B - 1)
  position = table.lengths[row] + token - (ends - counts)[row]
  live &= held[row]
  column = jnp.where(live, position // p, 0)
  page = table.pages[row, ..., column].T  # [total] or [2, total]
  live &= page != table.null
  return jnp.where(live, page * p + position % p, table.null * p)


def advance(table: PageTable, num_tokens: Int[Array, "B"]) -> PageTable:
  """Adds the tokens just written to `lengths`.

  Args:
    table: the table.
    num_tokens: int32 [B]; a row whose tokens exceed its reserved pages, or
      are negative, stays unchanged.

  Returns:
    The table with new lengths.

  Raises:
    ValueError: num_tokens is not int32 [B].
  """
  num_tokens = per_row("num_tokens", num_tokens, table, jnp.int32)
  held = (num_tokens >= 0) & (num_tokens <= table.capacities - table.lengths)
  lengths = table.lengths + jnp.where(held, num_tokens, 0)
  return dataclasses.replace(table, lengths=lengths)


def release(table: PageTable, rows: Bool[Array, "B"]) -> PageTable:
  """Empties rows and gives back their pages; a shared page loses one owner.

  Args:
    table: the table.
    rows: bool [B], the rows to empty; releasing an empty row does nothing.

  Returns:
    The table.

  Raises:
    ValueError: rows is not bool [B].
  """
  rows = per_row("rows", rows, table, jnp.bool_)
  chosen = rows.reshape((-1,) + (1,) * (table.pages.ndim - 1))
  leaving = jnp.where(chosen, table.pages, table.null)
  ref_counts = table.ref_counts.at[leaving].add(-1, mode="drop")
  return dataclasses.replace(
    table,
    pages=jnp.where(chosen, table.null, table.pages),
    lengths=jnp.where(rows, 0, table.lengths),
    ref_counts=ref_counts,
  )


def free_queue(
  table: PageTable,
) -> tuple[Int[Array, "P"], Int[Array, "P"]]:
  """Returns the free pages in the order they are served, and each page's rank.

  Args:
    table: the table.

  Returns:
    queue [P]: free page ids, rising, then nulls; rank [P]: a free page's place
    in the queue, P for an owned page.
  """
  P = table.num_pages
  free = table.ref_counts == 0
  rank = jnp.where(free, jnp.cumsum(free, dtype=jnp.int32) - 1, P)
  queue = jnp.full((P,), P, jnp.int32)
  queue = queue.at[rank].set(jnp.arange(P, dtype=jnp.int32), mode="drop")
  return queue, rank


def per_row(name: str, value: Any, table: PageTable, dtype: Any) -> Array:
  """Returns `value` as an array [B] of `dtype`, or raises ValueError."""
  value = jnp.asarray(value)
  if value.shape != (table.num_sequences,):
    raise ValueError(
      f"{name} has shape {value.shape} but the table has "
      f"B={table.num_sequences} rows: pass one value a row"
    )
  if value.dtype != dtype:
    raise ValueError(
      f"{name} has dtype {value.dtype}: pass {jnp.dtype(dtype).name}"
    )
  return value
