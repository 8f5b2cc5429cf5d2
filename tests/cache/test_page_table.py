"""The page table's promises, one by one."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax

SIZES = dict(num_pages=6, page_size=4, num_sequences=3, max_pages=3)


def i32(*values):
  return jnp.asarray(values, jnp.int32)


def make(**changes):
  return paged_jax.create_page_table(**(SIZES | changes))


def same(a, b):
  chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize("combined", [False, True])
def test_a_new_table_is_free_and_null(combined):
  table = make(combined=combined)
  assert table.pages.shape == ((3, 2, 3) if combined else (3, 3))
  assert (table.pages == 6).all() and int(table.num_free) == 6
  assert not table.lengths.any()
  paged_jax.check_invariants(table)


def test_reserve_serves_in_order_without_overtaking():
  table = make(num_pages=4)
  # Row 0 takes 2 pages, row 1 needs 3 of the 2 left; row 2 would fit but must
  # not overtake it.
  table, ok = paged_jax.reserve(table, i32(8, 12, 4))
  assert ok.tolist() == [True, False, False]
  assert table.pages[0].tolist() == [0, 1, 4]
  assert (table.pages[1:] == 4).all()


def test_rows_that_would_outgrow_their_pages_count_for_nothing():
  table, ok = paged_jax.reserve(make(), i32(4, 13, 4))
  assert ok.tolist() == [True, False, True]
  table, ok = paged_jax.reserve(table, i32(0, 2**31 - 1, -1))
  assert ok.tolist() == [True, False, False]


def test_rows_that_need_no_page_succeed_in_an_empty_pool():
  table, ok = paged_jax.reserve(make(num_pages=2), i32(7, 0, 0))
  assert ok.all() and int(table.num_free) == 0
  table = paged_jax.advance(table, i32(7, 0, 0))
  table, ok = paged_jax.reserve(table, i32(1, 0, 1))
  assert ok.tolist() == [True, True, False]


def test_exhaustion_at_every_step_leaves_the_row_as_it_was():
  for num_pages in range(1, 7):
    table = make(num_pages=num_pages)
    for _ in range(5):
      before = table
      table, ok = paged_jax.reserve(before, i32(3, 3, 3))
      paged_jax.check_invariants(table)
      for row in np.flatnonzero(~np.asarray(ok)):
        same(table.pages[row], before.pages[row])
      advanced = paged_jax.advance(table, i32(3, 3, 3))
      grown = np.asarray(advanced.lengths - before.lengths)
      assert (grown[~np.asarray(ok)] == 0).all()
      assert (grown[np.asarray(ok)] == 3).all()
      table = advanced


def test_reserved_pages_stay_until_release():
  table, _ = paged_jax.reserve(make(), i32(9, 0, 0))
  again, ok = paged_jax.reserve(table, i32(2, 0, 0))
  assert ok.all()
  same(again.pages, table.pages)


def test_double_release_does_nothing():
  table, _ = paged_jax.reserve(make(), i32(9, 4, 4))
  rows = jnp.array([True, False, True])
  once = paged_jax.release(table, rows)
  same(paged_jax.release(once, rows), once)
  assert int(once.num_free) == 5


def test_slots_of_a_row_beyond_its_pages_are_null_and_others_stay_packed():
  table, _ = paged_jax.reserve(make(), i32(5, 4, 4))
  slots = paged_jax.slot_mapping(table, i32(2, 5, 3), 12)
  null = 24
  assert slots.tolist() == [0, 1] + 5 * [null] + [12, 13, 14] + 2 * [null]
  table = paged_jax.advance(table, i32(2, 5, 3))
  assert table.lengths.tolist() == [2, 0, 3]


def test_slots_beyond_total_are_cut():
  table, _ = paged_jax.reserve(make(), i32(12, 4, 0))
  slots = paged_jax.slot_mapping(table, i32(12, 4, 0), 5)
  assert slots.tolist() == [0, 1, 2, 3, 4]


def test_combined_tables_draw_k_and_v_from_one_set():
  table, ok = paged_jax.reserve(make(combined=True), i32(5, 4, 4))
  assert ok.tolist() == [True, True, False]
  assert table.pages[0].tolist() == [[0, 2, 6], [1, 3, 6]]
  k, v = paged_jax.slot_mapping(table, i32(5, 0, 0), 5)
  assert k.tolist() == [0, 1, 2, 3, 8] and v.tolist() == [4, 5, 6, 7, 12]


@pytest.mark.parametrize("combined", [False, True])
def test_a_forked_row_writes_without_changing_its_parent(combined):
  table = make(num_pages=8, combined=combined)
  table, _ = paged_jax.reserve(table, i32(6, 0, 0))
  table = paged_jax.advance(table, i32(6, 0, 0))
  table, ok = paged_jax.fork(table, i32(3, 0, 3))
  assert ok.all() and table.lengths.tolist() == [6, 6, 0]
  same(table.pages[0], table.pages[1])
  pool = jax.random.normal(jax.random.key(0), (8, 1, 4, 2))

  step = i32(0, 1, 0)
  table, ok = paged_jax.reserve(table, step)
  assert ok.all()
  table, sources, targets, ok = paged_jax.copy_on_write(table, step)
  assert ok.all()
  kinds = zip(np.atleast_2d(sources), np.atleast_2d(targets), strict=True)
  copied = pool
  for source, target in kinds:
    copied = paged_jax.copy_pages(copied, source, target)
  paged_jax.check_invariants(table)
  k_of = lambda row: table.pages[row, 0] if combined else table.pages[row]
  assert int(k_of(0)[0]) == int(k_of(1)[0])  # the full page stays shared
  assert int(k_of(0)[1]) != int(k_of(1)[1])
  same(copied[k_of(1)[1]], pool[k_of(0)[1]])
  same(copied[k_of(0)[1]], pool[k_of(0)[1]])


def test_copy_pages_names_the_bad_argument():
  with pytest.raises(ValueError, match=r"pool has shape \(8, 4, 2\)"):
    paged_jax.copy_pages(jnp.ones((8, 4, 2)), i32(0), i32(1))
  with pytest.raises(ValueError, match=r"targets has shape \(2,\)"):
    paged_jax.copy_pages(jnp.ones((8, 1, 4, 2)), i32(0), i32(1, 2))


def test_copy_on_write_fails_in_an_exhausted_pool():
  table, _ = paged_jax.reserve(make(num_pages=2), i32(6, 0, 0))
  table = paged_jax.advance(table, i32(6, 0, 0))
  table, _ = paged_jax.fork(table, i32(3, 0, 3))
  after, sources, targets, ok = paged_jax.copy_on_write(table, i32(0, 1, 0))
  assert ok.tolist() == [True, False, True]
  assert (sources == 2).all() and (targets == 2).all()
  same(after, table)


def test_a_whole_step_compiles_once_and_runs_in_vmap_and_scan():
  def step(table, num_tokens):
    table, ok = paged_jax.reserve(table, num_tokens)
    slots = paged_jax.slot_mapping(table, num_tokens, 8)
    return paged_jax.advance(table, num_tokens), (slots, ok)

  chex.clear_trace_counter()
  compiled = jax.jit(chex.assert_max_traces(step, n=1))
  counts = jnp.array([[3, 0, 1], [5, 2, 0], [2, 2, 2], [0, 9, 0]], jnp.int32)
  table, out = make(), []
  for row in counts:
    table, result = compiled(table, row)
    out.append(result)
  scanned, results = jax.lax.scan(step, make(), counts)
  same(scanned, table)
  same(results, jax.tree.map(lambda *x: jnp.stack(x), *out))
  tables = jax.tree.map(lambda x: jnp.stack([x, x]), make())
  many, _ = jax.vmap(paged_jax.reserve)(tables, counts[:2])
  one, _ = paged_jax.reserve(make(), counts[1])
  same(jax.tree.map(lambda x: x[1], many), one)


def test_no_loop_in_the_compiled_step():
  def step(table, num_tokens):
    table, _ = paged_jax.reserve(table, num_tokens)
    slots = paged_jax.slot_mapping(table, num_tokens, 8)
    table = paged_jax.advance(table, num_tokens)
    return paged_jax.release(table, num_tokens > 0), slots

  text = str(jax.make_jaxpr(step)(make(), i32(1, 2, 3)))
  assert "while" not in text and "scan[" not in text


BROKEN = {
  "page ids": dict(pages=jnp.array([[0, 7, 6], [6] * 3, [6] * 3])),
  "before its nulls": dict(pages=jnp.array([[6, 0, 6], [6] * 3, [6] * 3])),
  "not negative": dict(lengths=i32(-1, 0, 0)),
  "tokens lie in its pages": dict(lengths=i32(1, 0, 0)),
  "number of its owners": dict(ref_counts=i32(1, 0, 0, 0, 0, 0)),
  "names a page once": dict(
    pages=jnp.array([[2, 2, 6], [6] * 3, [6] * 3]),
    ref_counts=i32(0, 0, 2, 0, 0, 0),
  ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_check_invariants_names_the_broken_rule(rule):
  with pytest.raises(AssertionError, match=rule):
    paged_jax.check_invariants(dataclasses.replace(make(), **BROKEN[rule]))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
def test_sizes_must_be_positive_ints(name, value):
  with pytest.raises(ValueError, match=f"{name} is .*at least 1"):
    make(**{name: value})


@pytest.mark.parametrize("name", ["num_pages", "max_pages"])
def test_slots_must_be_int32(name):
  with pytest.raises(ValueError, match=f"{name} is .*int32"):
    make(page_size=2**10, **{name: 2**21})


CALLS = {
  "reserve": lambda table, x: paged_jax.reserve(table, x),
  "advance": lambda table, x: paged_jax.advance(table, x),
  "slot_mapping": lambda table, x: paged_jax.slot_mapping(table, x, 4),
  "copy_on_write": lambda table, x: paged_jax.copy_on_write(table, x),
  "fork": lambda table, x: paged_jax.fork(table, x),
}


@pytest.mark.parametrize("call", CALLS)
def test_per_row_arguments_are_int32_of_b(call):
  name = "parents" if call == "fork" else "num_tokens"
  with pytest.raises(ValueError, match=rf"{name} has shape \(2,\).*B=3"):
    CALLS[call](make(), i32(1, 2))
  with pytest.raises(ValueError, match=f"{name} has dtype float32.*int32"):
    CALLS[call](make(), jnp.ones(3))


def test_release_takes_bools_and_slot_mapping_a_static_total():
  with pytest.raises(ValueError, match=r"rows has dtype int32.*bool"):
    paged_jax.release(make(), i32(0, 1, 0))
  with pytest.raises(ValueError, match=r"rows has shape \(1,\)"):
    paged_jax.release(make(), jnp.array([True]))
  for total in (0, -1, 2.0):
    with pytest.raises(ValueError, match=f"total is {total}"):
      paged_jax.slot_mapping(make(), i32(1, 1, 1), total)
