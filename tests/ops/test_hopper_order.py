"""`memory_order`: which pages change places, and that results stay right."""

import dataclasses

import chex
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import hopper_order, hopper_plan
from paged_jax.ops.plan import Geometry
from tests.conformance import data

needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)

GEOMETRY = Geometry(
  num_heads=8, num_kv_heads=4, head_dim=64, page_size=4, dtype="bfloat16",
  max_query_length=1, causal=True, window=None, combined=False,
)


def _order(table, lengths, starts=None, **changes):
  arrays = [
    None if x is None else jnp.asarray(x, jnp.int32)
    for x in (table, lengths, starts)
  ]
  geometry = dataclasses.replace(GEOMETRY, **changes)
  found = hopper_order.in_memory_order(*arrays, geometry)
  return [np.asarray(x).tolist() for x in found]


TABLE = ((9, 2, 7, 4, 5), (8, 6, 3, 1, 0))


@pytest.mark.parametrize(
  "lengths, starts, changes, want",
  [
    ((20, 16), None, {}, ((2, 4, 5, 7, 9), (1, 3, 6, 8, 0))),
    ((19, 0), None, {}, ((2, 4, 7, 9, 5), (8, 6, 3, 1, 0))),
    # The second token sees its own page, the first one not the end of it.
    ((20, 17), (0, 2, 3), {}, ((2, 4, 7, 9, 5), (1, 3, 6, 8, 0))),
    ((20, 17), (0, 1, 6), {}, ((2, 4, 5, 7, 9), (3, 6, 8, 1, 0))),
    ((20, 17), (0, 2, 7), dict(causal=False),
     ((2, 4, 5, 7, 9), (1, 3, 6, 8, 0))),
    # The window begins inside the first page, or with the second.
    ((18, 16), None, dict(window=15), ((9, 2, 4, 7, 5), (8, 1, 3, 6, 0))),
    ((20, 12), None, dict(window=16), ((9, 2, 4, 5, 7), (3, 6, 8, 1, 0))),
    # More tokens than keys: the first ones see nothing.
    ((6, 16), (0, 9, 9), {}, ((9, 2, 7, 4, 5), (1, 3, 6, 8, 0))),
  ],
)
def test_pages_that_all_tokens_see_whole_are_sorted(
  lengths, starts, changes, want
):
  (found,) = _order(TABLE, lengths, starts, **changes)
  assert found == [list(row) for row in want]


def test_v_follows_k():
  table = np.stack([TABLE, np.arange(10).reshape(2, 5)], axis=1)
  k, v = _order(table, (20, 15), combined=True)
  assert k == [[2, 4, 5, 7, 9], [3, 6, 8, 1, 0]]
  assert v == [[1, 3, 4, 2, 0], [7, 6, 5, 8, 9]]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_row_keeps_its_pages(draw):
  B, M, p = 3, 6, 4
  integers = lambda low, high, n: draw.draw(
    st.lists(st.integers(low, high), min_size=n, max_size=n)
  )
  table = np.array(integers(0, 9, B * M)).reshape(B, M)
  lengths, queries = integers(0, M * p, B), integers(0, 5, B)
  starts = np.cumsum([0, *queries])
  window = draw.draw(st.sampled_from([None, 1, 5, 9]))
  (found,) = _order(table, lengths, starts, window=window)
  for old, new, length, n in zip(table, found, lengths, queries):
    assert sorted(old) == sorted(new)
    first = 0 if window is None else max(length - window, 0)
    moves = [
      i for i in range(M) if i * p >= first and (i + 1) * p <= length - n + 1
    ]
    assert [new[i] for i in moves] == sorted(old[i] for i in moves)
    stays = [i for i in range(M) if i not in moves]
    assert [new[i] for i in stays] == [old[i] for i in stays]


def _plan(made, memory_order=True, **more):
  arrays = made.page_table, made.lengths, made.query_starts
  return paged_jax.plan_attention(
    *arrays, **data.plan_arguments(made), memory_order=memory_order, **more
  )


@needs_interpreter
@pytest.mark.parametrize(
  "changes",
  [
    dict(lengths=(150, 1, 97, 0)),
    dict(lengths=(150, 1, 97, 0), combined=True),
    dict(lengths=(100, 64, 90), query_lengths=(3, 8, 0)),
    dict(lengths=(100, 64, 90), query_lengths=(3, 8, 1), window=50),
    dict(lengths=(100, 5), query_lengths=(4, 8), causal=False),
    dict(lengths=(550, 31), p=128),
  ],
)
def test_results_stay_right(changes):
  """What is dead, in sorted rows too, is poisoned by `data.problem`."""
  if "query_lengths" in changes:
    changes = changes | dict(max_query_length=8)
  made = data.problem(
    71, **dict(dict(N=4, K=2, H=64, p=8, dtype=jnp.bfloat16), **changes)
  )
  plan = _plan(made, implementation="hopper")
  assert isinstance(plan.work, hopper_plan.Work)
  data.assert_right(made, *data.call(made, "hopper", plan=plan))
  tables = made.page_table
  if made.page_table.ndim == 3:
    tables = tables[:, 0]
  assert (plan.work.tables[0] != tables).any()


@needs_interpreter
def test_what_dead_slots_hold_changes_no_bit():
  made = data.problem(74, lengths=(150, 1, 97), N=4, K=2, H=64, p=8,
                      dtype=jnp.bfloat16)
  plan = _plan(made, implementation="hopper")
  results = [
    data.call(made.poisoned(value), "hopper", plan=plan)
    for value in (float("nan"), 3e38, 0.0)
  ]
  for result in results[1:]:
    data.assert_same_bits(results[0], result)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_elsewhere_it_is_ignored(implementation):
  made = data.problem(
    72, lengths=(40, 17), query_lengths=(20, 9), H=64, max_query_length=20,
    dtype=jnp.bfloat16,
  )
  plan = _plan(made, implementation=implementation)
  out, lse = data.call(made, implementation, plan=plan)
  plain = _plan(made, implementation=implementation, memory_order=False)
  chex.assert_trees_all_equal(plan, plain)
  data.assert_same_bits(
    (out, lse), data.call(made, implementation, plan=plain)
  )


@pytest.mark.parametrize("other", ["batch_invariant", "shared_prefix"])
def test_it_goes_alone(other):
  made = data.problem(73, lengths=(3,), H=64, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match=f"memory_order .*{other}=True.*drop"):
    _plan(made, **{other: True})
