"""The attention modules: Linen equals NNX, and bad sizes are named."""

import dataclasses
import subprocess
import sys

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
    (dict(window=0), "window is 0"),
    (dict(dtype="foo"), "dtype is 'foo'.*float32"),
  ],
)
def test_bad_sizes(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_CONFIG, **change)


def _prefilled(config, counts, total, **options):
  table = page_table.create_page_table(
    num_pages=9, page_size=4, num_sequences=2, max_pages=4
  )
  counts = jnp.array(counts, jnp.int32)
  return step_lib.prefill_step(table, counts, config, total=total, **options)


def test_rows_that_do_not_fit_the_packed_tokens_sit_out():
  before = jax.jit(lambda: _prefilled(_CONFIG, [3, 4], 5))
  table, step, ok = before()
  assert ok.tolist() == [True, False]
  assert table.lengths.tolist() == [3, 0]
  assert step.lengths.tolist() == [3, 0]
  assert step.query_starts.tolist() == [0, 3, 3]


@pytest.mark.parametrize(
  "counts, ok",
  [
    ([9, 0], [False, True]),
    ([2**31 - 1, 5], [False, False]),
    ([0, 8], [True, True]),
  ],
)
def test_what_lies_within_the_packed_tokens(counts, ok):
  assert _prefilled(_CONFIG, counts, 8)[2].tolist() == ok


def test_counts_of_a_step_are_checked():
  table = page_table.create_page_table(
    num_pages=9, page_size=4, num_sequences=2, max_pages=4
  )
  for counts, message in (
    (jnp.array([True, False]), "dtype bool: pass int32"),
    (jnp.ones((2, 2), jnp.int32), "num_tokens has shape"),
  ):
    with pytest.raises(ValueError, match=message):
      step_lib.prefill_step(table, counts, _CONFIG, total=8)


def test_a_layer_with_another_window_has_a_plan_of_its_own():
  """The step's plan is for one window; the result is the layer's own."""
  local = _CONFIG
  everywhere = dataclasses.replace(_CONFIG, window=None)
  layer = paged_nnx.PagedAttention(local, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (12, 24))
  cache = pool.create_cache(
    num_layers=1, num_pages=9, num_kv_heads=2, page_size=4, head_dim=8
  )
  outs = []
  for planned in (local, everywhere):
    _, step, _ = _prefilled(planned, [9, 3], 12)
    assert step.plan.geometry.window == planned.window
    outs.append(layer(x, cache, step, layer=0)[0])
  np.testing.assert_array_equal(*outs)
  assert step.plan_for(everywhere) is step.plan
  assert step.plan_for(local).geometry.window == local.window
  refused = dataclasses.replace(
    step, plan_options=("batch_invariant",), implementation="xla"
  )
  with pytest.raises(NotImplementedError, match="batch_invariant with"):
    refused.plan_for(local)


def test_a_step_of_another_page_size_is_refused():
  layer = paged_nnx.PagedAttention(_CONFIG, rngs=nnx.Rngs(0))
  _, step, _ = _prefilled(_CONFIG, [9, 3], 12)
  cache = pool.create_cache(
    num_layers=1, num_pages=9, num_kv_heads=2, page_size=8, head_dim=8
  )
  with pytest.raises(ValueError, match="made for page_size=4"):
    layer(jnp.ones((12, 24)), cache, step, layer=0)


def test_a_step_takes_the_options_of_plans():
  config = dataclasses.replace(_CONFIG, dtype="bfloat16", head_dim=64)
  with pytest.raises(NotImplementedError, match="batch_invariant with"):
    _prefilled(
      config, [9, 3], 12, plan_options=("batch_invariant",),
      implementation="xla",
    )
  table = page_table.create_page_table(
    num_pages=9, page_size=4, num_sequences=2, max_pages=4
  )
  with pytest.raises(NotImplementedError, match="batch_invariant with"):
    step_lib.decode_step(
      table, jnp.array([True, False]), config,
      plan_options=("batch_invariant",), implementation="xla",
    )
  with pytest.raises(ValueError, match="plan_options is .*memory_order"):
    _prefilled(config, [9, 3], 12, plan_options=("fast",))


def test_the_modules_are_found_in_the_package():
  code = (
    "import sys, paged_jax; assert 'flax' not in sys.modules; "
    "paged_jax.nnx.PagedAttention, paged_jax.linen.PagedAttention"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
