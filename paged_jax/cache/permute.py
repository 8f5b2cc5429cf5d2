"""Other physical pages for the same tokens.

    pages  0 1 2      permutation 0->5, 1->3, 2->0      pages  5 3 0

A fresh table hands out pages in increasing order, so a mix-up of page ids can
hide: the identity maps everything right. Renaming the pages of a table that
has reserved but not yet written gives every row a scattered set.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.cache.page_table import PageTable
from paged_jax.cache.pool import Cache


def permute_table(
  table: PageTable, permutation: Int[Array, "P"]
) -> PageTable:
  """Renames page i to `permutation[i]`, wherever the table names it.

  Args:
    table: the table.
    permutation: int32 [P], a permutation of 0..P-1.

  Returns:
    The table; `permute_cache` moves what has been written already.

  Raises:
    ValueError: permutation has not P entries.
  """
  permutation = jnp.asarray(permutation, jnp.int32)
  if permutation.shape != (table.num_pages,):
    raise ValueError(
      f"permutation has shape {permutation.shape} but the table has "
      f"P={table.num_pages} pages: pass one new id a page"
    )
  renamed = jnp.append(permutation, jnp.int32(table.null))  # null stays null
  return dataclasses.replace(
    table,
    pages=renamed[table.pages],
    ref_counts=table.ref_counts.at[permutation].set(table.ref_counts),
  )


def permute_cache(cache: Cache, permutation: Int[Array, "P"]) -> Cache:
  """Moves page i of every layer to page `permutation[i]`."""
  return jax.tree.map(lambda pool: pool.at[:, permutation].set(pool), cache)
