"""Shared prefixes of `hopper`: what is found, and that both parts add up."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import hopper, hopper_shared
from paged_jax.ops import hopper_prefill_plan as prefill_plan
from tests.conformance import data

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)

PAGE = 16
SIZES = types.MappingProxyType(dict(
  num_heads=4, num_kv_heads=2, head_dim=64, page_size=PAGE, dtype="bfloat16"
))


def _share(made, pages, rows=None):
  """All `rows` begin with the pages of the first; what is freed is NaN."""
  table = np.asarray(made.page_table).copy()
  rows = range(len(table)) if rows is None else rows
  for b in rows:
    table[b, ..., :pages] = table[rows[0], ..., :pages]
  return made.replace(page_table=jnp.asarray(table)).poisoned(float("nan"))


def _make_plan(arrays, least=1, num_tokens=None, **static):
  """A plan whose prefix may be as short as `least` tokens."""

  @jax.jit  # one program instead of dozens
  def make(arrays):
    plan = paged_jax.plan_attention(
      *arrays, num_tokens=num_tokens, shared_prefix=True,
      implementation="hopper", **static
    )
    work = hopper.make_plan(
      *arrays, plan.geometry, num_tokens=num_tokens, shared_prefix=True,
      least_shared=least,
    )
    return dataclasses.replace(plan, work=work)

  return make(arrays)


def _plan(made, **more):
  arrays = made.page_table, made.lengths, made.query_starts
  return _make_plan(arrays, **data.plan_arguments(made), **more)


def _check(made, tokens, **more):
  """Holds a problem to the oracle, and its prefix to a number of tokens."""
  plan = _plan(made, **more)
  assert plan.work.prefix_length.tolist() == [tokens]
  out, lse = data.call(made, "hopper", plan=plan)
  data.assert_right(made, out, lse)
  return out, lse


def _problem(seed, **changes):
  return data.problem(
    seed, **dict(dict(H=64, p=PAGE, dtype=jnp.bfloat16), **changes)
  )


# --- what is shared -----------------------------------------------------------


def _shared(table, lengths, starts=None, *, least=1, **changes):
  """Returns how many pages are found shared, and the plan's work."""
  arrays = [
    None if x is None else jnp.asarray(x, jnp.int32)
    for x in (table, lengths, starts)
  ]
  work = _make_plan(
    arrays, least, max_query_length=64, **dict(SIZES, **changes)
  ).work
  return int(work.prefix_length[0]) // PAGE, work


TABLE = ((7, 2, 9, 4, 99), (7, 2, 9, 1, 5), (7, 2, 9, 8, 0))


def test_leading_columns_that_are_equal():
  assert _shared(TABLE, (64, 80, 70))[0] == 3
  assert _shared([[7, 2, 9], [3, 2, 9]], (48, 48))[0] == 0


def test_rows_keep_their_queries_and_a_token():
  assert _shared(TABLE, (64, 80, 49))[0] == 3
  assert _shared(TABLE, (64, 80, 48))[0] == 2
  assert _shared(TABLE, (64, 80, 48), (0, 1, 2, 18))[0] == 2
  assert _shared(TABLE, (64, 80, 48), (0, 1, 2, 19))[0] == 1
  # More queries than tokens: some see nothing, so nothing is shared.
  assert _shared(TABLE, (64, 80, 10), (0, 1, 2, 22))[0] == 0


def test_rows_that_take_no_part_are_overlooked():
  table = ((1, 1, 1, 1, 1), *TABLE, (7, 3, 3, 3, 3))
  assert _shared(table, (80, 64, 80, 70, 80), (0, 0, 1, 2, 3, 3))[0] == 3
  assert _shared(table, (0, 64, 80, 70, 0))[0] == 3
  # An empty row has nothing to share, but one with queries must see nothing.
  assert _shared(table, (0, 64, 80, 70, 0), (0, 1, 2, 3, 4, 5))[0] == 0


def test_one_row_shares_nothing():
  assert _shared(TABLE[:1], (64,))[0] == 0
  assert _shared(TABLE, (0, 80, 0))[0] == 0
  assert _shared(TABLE, (0, 0, 0))[0] == 0


def test_v_pages_must_be_equal_too():
  table = np.stack([TABLE, TABLE], axis=1)
  table[:, 1] += 20
  assert _shared(table, (64, 80, 70))[0] == 3
  table[2, 1, 1] = 50
  assert _shared(table, (64, 80, 70))[0] == 1


def test_least_tokens():
  assert _shared(TABLE, (64, 80, 70), least=48)[0] == 3
  assert _shared(TABLE, (64, 80, 70), least=49)[0] == 0
  assert hopper_shared.LEAST_TOKENS > 48
  plan = paged_jax.plan_attention(
    jnp.asarray(TABLE), jnp.array([64, 80, 70], jnp.int32), shared_prefix=True,
    implementation="hopper", **SIZES
  )
  assert plan.work.prefix_length.tolist() == [0]
  assert plan.work.prefix.head[0] == 0


@pytest.mark.parametrize("num_heads", [4, 6, 14])
def test_parts_of_the_prefix_cover_it_once(num_heads, monkeypatch):
  monkeypatch.setattr(hopper, "_num_sms", lambda interpret: 132)
  B, pages = 70, 60
  table = np.tile(np.arange(pages + 1), (B, 1))
  found, work = _shared(
    table, np.full(B, 16 * pages + 3), num_heads=num_heads
  )
  assert found == pages
  lib, prefix = prefill_plan, work.prefix
  tiles = np.asarray(prefix.tiles)[: int(prefix.head[0])]
  config = prefix.config
  assert config.splits > 1
  group = num_heads // 2
  steps = -(-pages * PAGE // config.tile)
  seen = np.zeros((config.out_rows(B), group, steps), int)
  for tile in tiles:
    own, head, kind = lib.unpack(tile[lib.ROWS])
    first, heads = tile[lib.TOKEN], config.kinds[kind][1]
    begin, end = tile[lib.BEGIN], tile[lib.END]
    split = lib.split_of(tile[lib.ROWS])
    assert tile[lib.AT] == 0  # or tokens would see nothing
    assert begin == steps * split // config.splits
    seen[first : first + own, head : head + heads, begin:end] += 1
  assert (seen == 1).all()
  walked = tiles[:, lib.END] - tiles[:, lib.BEGIN] > 0
  assert (walked[:-1] >= walked[1:]).all()  # parts without tiles come last
  assert walked.all() == (steps >= config.splits)


@pytest.mark.parametrize(
  "items, num_ctas, splits",
  [(16, 132, 8), (8, 132, 16), (132, 132, 1), (1000, 132, 1), (70, 132, 5)],
)
def test_parts_fill_the_ctas(items, num_ctas, splits):
  assert hopper_shared._num_splits(items, num_ctas) == splits


# --- both parts, interpreted or native ----------------------------------------


def test_decode_rows_share_their_beginning():
  made = _share(_problem(1, lengths=(300, 417, 290, 0, 330)), 17, (0, 1, 2, 4))
  out, lse = _check(made, 272)
  assert not np.asarray(out[3]).any() and np.isneginf(lse[3]).all()


@pytest.mark.slow
def test_a_row_alone():
  _check(_problem(2, lengths=(40,)), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "more",
  [
    dict(N=6, sinks=True, soft_cap=4.0),  # packed tiles with empty rows
    dict(N=7, K=1, dtype=jnp.float16),
    dict(N=4, K=4, H=128, combined=True, p=8),
    dict(N=4, K=1, H=80, one_pool=True, combined=True),
    dict(N=2, K=1, H=256),
    dict(N=2, K=1, H=192, p=64, causal=False),
  ],
)
def test_decode_variants(more):
  p = more.get("p", PAGE)
  made = _problem(3, **dict(dict(lengths=(130, 131, 200, 0, 181)), **more))
  _check(_share(made, 128 // p, (0, 1, 2, 4)), 128)


@pytest.mark.parametrize(
  "longest", [4, pytest.param(33, marks=pytest.mark.slow)]
)
def test_several_query_tokens_a_row(longest):
  """Unaligned starts, rows without queries, tokens that no row owns."""
  made = _share(_problem(
    4, query_lengths=(3, 0, 1, longest, 2), lengths=(167, 9, 170, 205, 164),
    T=45, N=6, sinks=True, max_query_length=longest,
  ), 10, (0, 2, 3, 4))
  made = made.replace(query=made.query.at[6 + longest :].set(np.nan))
  clean = made.replace(query=jnp.nan_to_num(made.query))
  plan = _plan(made)
  assert plan.work.prefix_length.tolist() == [160]
  out, lse = data.call(made, "hopper", plan=plan)
  data.assert_right(clean, out, lse)


@pytest.mark.slow
def test_query_tiles_of_both_kinds():
  """Enough tokens for tiles of one head, and a rest."""
  made = _problem(
    5, query_lengths=(100, 33, 4), lengths=(250, 180, 133), N=3, K=1,
    max_query_length=100,
  )
  made = _share(made, 8)
  _check(made, 128, num_tokens=137)


@pytest.mark.slow
def test_dead_slots_and_moved_pages_change_no_bit():
  made = _share(_problem(6, lengths=(150, 137)), 8)
  want = data.call(made, "hopper", plan=_plan(made))
  got = data.call(made.poisoned(np.inf), "hopper", plan=_plan(made))
  data.assert_same_bits(got, want)
  moved = made.moved()
  data.assert_same_bits(data.call(moved, "hopper", plan=_plan(moved)), want)


def test_extreme_logits_have_one_winner():
  """The key that wins lies in the prefix for one row, beyond for the other."""
  made = _share(_problem(7, lengths=(150, 137)), 8).poisoned(0.0)
  table = np.asarray(made.page_table)
  k = jnp.zeros_like(made.k_pages)
  k = k.at[table[0, 2], :, 3, 0].set(400.0)  # position 35 of both
  k = k.at[table[1, 8], :, 5, 0].set(800.0)  # position 133 of the second
  made = made.replace(
    k_pages=k, query=jnp.zeros_like(made.query).at[..., 0].set(400.0)
  )
  out, _ = data.call(made, "hopper", plan=_plan(made))
  for row, (page, at) in enumerate([(table[0, 2], 3), (table[1, 8], 5)]):
    want = jnp.repeat(made.v_pages[page, :, at], 2, axis=0)
    assert (out[row] == want).all()


def test_shared_lengths_never_recompile():
  """One trace serves prefixes of any length, plan and attention."""
  base = _problem(8, lengths=(300, 290, 280))

  def step(query, k_pages, v_pages, table, lengths):
    plan = paged_jax.plan_attention(
      table, lengths, shared_prefix=True, implementation="hopper", **SIZES
    )
    out, lse = paged_jax.paged_attention(
      query, k_pages, v_pages, table, lengths, plan=plan, return_lse=True,
      implementation="hopper",
    )
    return out, lse, plan.work.prefix_length

  run = jax.jit(chex.assert_max_traces(step, n=1))
  for pages, tokens in ((17, 272), (16, 256), (15, 0), (0, 0)):
    made = _share(base, pages)
    out, lse, found = run(*made.arrays[:5])
    assert found.tolist() == [tokens]
    data.assert_right(made, out, lse)


def test_parts_that_no_tile_wrote_may_hold_anything():
  nothing = jnp.full((2, 3, 4, 8), jnp.nan)
  own = jnp.arange(96.0).reshape(3, 4, 8)
  lse = jnp.zeros((3, 4))
  takes = jnp.zeros(3, bool)
  got = hopper_shared._merge(nothing, nothing[..., 0], takes, own, lse)
  data.assert_same_bits(got, (own, lse))


# --- asking for it ------------------------------------------------------------


def _ask(**changes):
  arguments = dict(SIZES, shared_prefix=True, implementation="hopper")
  return paged_jax.plan_attention(
    jnp.asarray(TABLE), jnp.array([64, 80, 70], jnp.int32),
    **dict(arguments, **changes)
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(shared_prefix=1), "shared_prefix is 1: pass True or False"),
    (dict(head_dim=None), "shared_prefix needs num_heads.*pass all"),
    (dict(batch_invariant=True), "batch_invariant=True.*drop one"),
  ],
)
def test_arguments_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    _ask(**changes)


@pytest.mark.parametrize(
  "changes",
  [dict(window=30), dict(dtype="float32"), dict(head_dim=32),
   dict(page_size=4)],
)
def test_refused_by_hopper_ignored_by_choice(changes):
  with pytest.raises(NotImplementedError):
    _ask(**changes)
  assert _ask(implementation=None, **changes).work is None


def test_other_implementations_ignore_it():
  made = _share(_problem(9, lengths=(60, 70), dtype=jnp.float32), 3)
  plan = paged_jax.plan_attention(
    made.page_table, made.lengths, shared_prefix=True, implementation="xla",
    **dict(SIZES, dtype="float32")
  )
  out, lse = data.call(made, "xla", plan=plan)
  data.assert_right(made, out, lse)


def test_a_stale_plan_is_refused():
  made = _share(_problem(10, lengths=(60, 70)), 3)
  plan = _plan(made)
  table = made.page_table.at[1, 0].set(made.page_table[1, 4])
  with pytest.raises(ValueError, match="stale: page_table has changed"):
    data.call(made.replace(page_table=table), "hopper", jit=False, plan=plan)
