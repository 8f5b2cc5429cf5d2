"""The attention modules: Linen equals NNX, and bad sizes are named."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import linen as paged_linen
from paged_jax import nnx as paged_nnx
from paged_jax.cache import page_table, pool
from paged_jax.models import step as step_lib

_CONFIG = paged_nnx.AttentionConfig(
  features=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  qkv_bias=True,
  qk_norm=True,
  window=6,
)


def test_linen_equals_nnx():
  module = paged_nnx.PagedAttention(_CONFIG, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  graph, state = nnx.split(module)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state
  )
  table = page_table.create_page_table(
    num_pages=9, page_size=4, num_sequences=2, max_pages=4
  )
  counts = jnp.array([7, 3], jnp.int32)
  table, step, ok = step_lib.prefill_step(
    table, counts, _CONFIG, total=12, implementation="reference"
  )
  assert ok.all()
  cache = pool.create_cache(
    num_layers=3, num_pages=9, num_kv_heads=2, page_size=4, head_dim=8
  )
  cache = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), cache
  )
  x = jnp.asarray(rng.normal(size=(12, 24)), jnp.float32)
  run = jax.jit(lambda state: nnx.merge(graph, state)(x, cache, step, layer=1))
  want, want_cache = run(state)
  twin = paged_linen.PagedAttention(_CONFIG)
  made = jax.eval_shape(
    lambda key: twin.init(key, x, cache, step, layer=1), jax.random.key(0)
  )
  weights = {"params": nnx.to_pure_dict(state)}
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(made) == shapes(weights)
  apply = jax.jit(lambda w: twin.apply(w, x, cache, step, layer=1))
  got, got_cache = apply(weights)
  np.testing.assert_array_equal(got, want)
  jax.tree.map(np.testing.assert_array_equal, got_cache, want_cache)
  # Only layer 1 was written, and only the ten slots of the new tokens.
  changed = np.asarray(want_cache.k_pages != cache.k_pages).any((2, 4))
  assert not changed[[0, 2]].any()
  slots = np.asarray(step.slots)
  np.testing.assert_array_equal(
    np.flatnonzero(changed[1]), np.sort(slots[slots < 36])
  )
  assert changed.sum() == 10


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(num_heads=3), "num_heads is 3, not a multiple"),
    (dict(head_dim=7), "head_dim is 7"),
    (dict(features=0), "features is 0"),
    (dict(num_kv_heads=2.0), "num_kv_heads is 2.0"),
  ],
)
def test_bad_sizes(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_CONFIG, **change)
