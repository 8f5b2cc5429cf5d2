"""Pages renamed and moved: the same tokens at other places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.cache import page_table, permute, pool


@pytest.mark.parametrize("combined", [False, True])
def test_tokens_keep_their_values(combined):
  table = page_table.create_page_table(
    num_pages=19, page_size=4, num_sequences=3, max_pages=4, combined=combined
  )
  counts = jnp.array([5, 0, 13], jnp.int32)
  table, ok = page_table.reserve(table, counts)
  assert ok.all()
  table = page_table.advance(table, counts)
  cache = pool.create_cache(
    num_layers=2,
    num_pages=19,
    num_kv_heads=2,
    page_size=4,
    head_dim=8,
    combined=combined,
  )
  rng = np.random.default_rng(0)
  cache = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), cache
  )
  order = jnp.asarray(rng.permutation(19))
  moved_table = permute.permute_table(table, order)
  moved = permute.permute_cache(cache, order)
  paged_jax.check_invariants(moved_table)
  assert moved_table.num_free == table.num_free
  used = np.asarray(table.pages) < table.null
  assert (np.asarray(moved_table.pages)[~used] == table.null).all()
  for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(moved)):
    np.testing.assert_array_equal(
      new[:, np.asarray(moved_table.pages)[used]],
      old[:, np.asarray(table.pages)[used]],
    )
  # What is free is handed out next, and nothing else.
  moved_table, ok = page_table.reserve(moved_table, jnp.array([4, 4, 0]))
  assert ok.all()
  paged_jax.check_invariants(moved_table)


def test_bad_sizes():
  table = page_table.create_page_table(
    num_pages=4, page_size=4, num_sequences=1, max_pages=2
  )
  with pytest.raises(ValueError, match=r"permutation has shape \(3,\)"):
    permute.permute_table(table, jnp.arange(3))
  with pytest.raises(ValueError, match="head_dim is 0"):
    pool.create_cache(
      num_layers=1, num_pages=4, num_kv_heads=1, page_size=4, head_dim=0
    )
