"""What holds of every page table, checked on the host."""

import numpy as np

from paged_jax.cache.page_table import PageTable


def check_invariants(table: PageTable) -> None:
  """Raises AssertionError naming the first rule that `table` breaks.

  Eager: it copies the table to the host.

  Args:
    table: the table.

  Raises:
    AssertionError: a rule is broken; the message names the rule and the place.
  """
  P, M, p = table.num_pages, table.max_pages, table.page_size
  pages = np.asarray(table.pages).reshape(table.num_sequences, -1, M)
  lengths, counts = np.asarray(table.lengths), np.asarray(table.ref_counts)

  def rule(name, broken):
    if np.any(broken):
      at = np.argwhere(np.asarray(broken))[0].tolist()
      raise AssertionError(f"page table breaks the rule '{name}' at {at}")

  rule("page ids lie in 0..P", (pages < 0) | (pages > P))
  owned = pages < P
  rule("a row's pages come before its nulls", owned[..., 1:] & ~owned[..., :-1])
  rule("K and V have equally many pages", owned[:, :1] != owned)
  rule("lengths are not negative", lengths < 0)
  rule("a row's tokens lie in its pages", lengths > owned[:, 0].sum(-1) * p)
  found = np.bincount(pages[owned], minlength=P)
  rule("a page's count is the number of its owners", found != counts)
  for b, row in enumerate(pages):
    ids = row[row < P]
    twice = len(ids) != len(set(ids.tolist()))
    if twice:
      raise AssertionError(
        f"page table breaks the rule 'a row names a page once' at row {b}"
      )
