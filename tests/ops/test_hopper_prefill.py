"""The prefill kernel of `hopper`: its plan, and what packed tiles may break."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import hopper_prefill_plan as plan_lib
from paged_jax.ops import hopper_prefill_units as units_lib
from paged_jax.ops.plan import Geometry
from tests.conformance import data

needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)

GEOMETRY = Geometry(
  num_heads=6, num_kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16",
  max_query_length=600, causal=True, window=None, combined=False,
)


# --- the plan ---------------------------------------------------------------


def _work(queries, lengths, num_tokens=None, **changes):
  geometry = dataclasses.replace(GEOMETRY, **changes)
  starts = np.cumsum((0, *queries)).astype(np.int32)
  config = plan_lib.choose(geometry, len(queries), num_tokens)
  work = plan_lib.make_work(
    jnp.array(lengths, jnp.int32), jnp.asarray(starts), geometry, config,
    num_tokens,
  )
  listed = int(work.head[0])
  return np.asarray(work.tiles)[:listed], config, starts, work


@pytest.mark.parametrize("num_heads", [2, 6, 8, 14, 42])
@pytest.mark.parametrize("known", [True, False])
def test_tiles_hold_every_token_and_head_once(num_heads, known):
  queries = (130, 1, 0, 77, 3, 600, 1, 1)
  lengths = (400, 90, 5, 77, 3, 650, 1, 999)
  T = sum(queries)
  tiles, config, starts, work = _work(
    queries, lengths, T if known else None, num_heads=num_heads
  )
  group = num_heads // 2
  count = np.zeros((T, group), int)
  for tile in tiles:
    own, head, kind = plan_lib.unpack(tile[plan_lib.ROWS])
    tokens, heads = config.kinds[kind]
    first = tile[plan_lib.TOKEN]
    b = tile[plan_lib.SEQUENCE]
    assert 0 < own <= tokens
    assert starts[b] <= first and first + own <= starts[b + 1]
    assert tile[plan_lib.AT] == lengths[b] - queries[b] + (first - starts[b])
    count[first : first + own, head : head + heads] += 1
  assert (count == 1).all()
  assert int(work.head[1]) == T


def test_tiles_walk_what_their_rows_see_longest_first():
  tiles, config, _, _ = _work((300, 1), (1000, 700), window=200)
  steps = tiles[:, plan_lib.END] - tiles[:, plan_lib.BEGIN]
  assert (np.diff(steps) <= 0).all()
  for tile in tiles:
    own, _, _ = plan_lib.unpack(tile[plan_lib.ROWS])
    low = max(tile[plan_lib.AT] - 199, 0)
    assert tile[plan_lib.BEGIN] == low // config.tile
    assert tile[plan_lib.END] == -(-(tile[plan_lib.AT] + own) // config.tile)


@pytest.mark.parametrize(
  "changes",
  [
    dict(num_heads=8),
    dict(num_heads=8, window=200),
    dict(num_heads=4, window=333),
    dict(num_heads=8, causal=False),
    dict(window=90),
    dict(num_heads=8, head_dim=256, window=50),
  ],
)
def test_units_are_what_rows_see(changes):
  tiles, config, _, _ = _work(
    (300, 1, 40, 150), (1000, 700, 90, 140), 491, **changes
  )
  geometry = dataclasses.replace(GEOMETRY, **changes)
  inputs = types.SimpleNamespace(
    causal=geometry.causal, window=geometry.window, max_query_length=300
  )
  assert config.part == (128 if geometry.num_heads == 6 else 64)
  for tile in tiles:
    own, _, _ = plan_lib.unpack(tile[plan_lib.ROWS])
    row = tile[plan_lib.AT] + np.arange(own)[:, None]
    position = np.arange(1152)
    sees = (position < tile[plan_lib.LENGTH]) & (row >= 0)
    if geometry.causal:
      sees &= position <= row
    if geometry.window is not None:
      sees &= position > row - geometry.window
    units = units_lib.Units(
      inputs=inputs, config=config, tile=jnp.asarray(tile)
    )
    walked = [
      (units.unit(jnp.int32(i), stretch.width), stretch.masked)
      for stretch in units.stretches()
      for i in range(int(stretch.first), int(stretch.last))
    ]
    left = sees.any(axis=0)
    opened, closed = [], []
    for unit, masked in walked:
      span = slice(int(unit.position), int(unit.position) + unit.width)
      assert sees[:, span].any()
      assert masked or sees[:, span].all()
      assert int(unit.tile) == span.start // config.tile
      left[span] = False
      opened += [int(unit.tile)] * bool(unit.opens)
      closed += [int(unit.tile)] * bool(unit.closes)
      assert len(opened) - len(closed) == (not unit.closes)
    assert not left.any()
    assert opened == closed
    assert opened == list(range(tile[plan_lib.BEGIN], tile[plan_lib.END]))
    assert [bool(unit.ends) for unit, _ in walked] == (
      [False] * (len(walked) - 1) + [True]
    )


def test_mixed_batches_have_narrow_tiles():
  """One warpgroup multiplies for a decode row; no plan of prompts has them."""
  tiles, config, _, _ = _work((512, 1, 9, 1), (512, 90, 9, 1), 523, num_heads=8)
  assert config.narrow and config.kinds == ((16, 4), (32, 4))
  kinds = plan_lib.unpack(tiles[:, plan_lib.ROWS])[2]
  assert ((kinds == 0) == (tiles[:, plan_lib.SEQUENCE] > 0)).all()
  for more in (dict(window=90), dict(num_heads=32)):
    assert not _work((512, 1, 9, 1), (512, 90, 9, 1), 523, **more)[1].narrow
  assert not _work((600, 590), (600, 590), 1190, num_heads=8)[1].narrow
  assert not _work((512, 1, 9, 1), (512, 90, 9, 1), num_heads=8)[1].narrow


@pytest.mark.parametrize("num_heads", [2, 6, 8, 14, 42])
def test_what_a_batch_invariant_plan_walks_is_the_same_for_every_batch(
  num_heads
):
  geometry = dataclasses.replace(
    GEOMETRY, num_heads=num_heads, max_query_length=500
  )
  configs = [
    plan_lib.choose(geometry, B, T, batch_invariant=True)
    for B, T in ((1, None), (1, 500), (64, 600))
  ]
  assert [c.narrow for c in configs] == [False, False, num_heads <= 16]
  assert len({(c.tile, c.part, c.late) for c in configs}) == 1


def test_tiles_without_keys_come_last():
  """What was found ahead of one of them is not there for the next one."""
  tiles, _, _, _ = _work((40, 300, 1, 20), (0, 900, 0, 5), 361, num_heads=8)
  steps = tiles[:, plan_lib.END] - tiles[:, plan_lib.BEGIN]
  assert (steps == 0).any()
  assert ((steps > 0)[:-1] >= (steps > 0)[1:]).all()


def test_light_tiles_lie_among_others_of_their_length():
  """Decode rows of 4k beside a chunk: memory and tensor cores busy at once."""
  tiles, _, _, _ = _work(
    (512, *[1] * 30), (8000, *[4096] * 30), 542, num_heads=8
  )
  light = tiles[:, plan_lib.SEQUENCE] > 0
  assert light.sum() == 30 and len(light) == 46
  counts = [part.sum() for part in np.array_split(light, 4)]
  assert min(counts) >= 6, counts
  longer, _, _, _ = _work((512, 1), (500, 30000), 513, num_heads=8)
  assert longer[0, plan_lib.SEQUENCE] == 1  # long ones still come first


def test_decode_rows_are_packed_and_long_prompts_are_not():
  tiles, config, _, _ = _work((512, 1), (512, 4000), num_heads=14)
  kinds = plan_lib.unpack(tiles[:, plan_lib.ROWS])[2]
  assert config.kinds == ((128, 1), (16, 7))
  assert (kinds == tiles[:, plan_lib.SEQUENCE]).all()


@pytest.mark.parametrize(
  "changes",
  [dict(dtype="float32"), dict(head_dim=32), dict(page_size=512)],
)
def test_refusals(changes):
  with pytest.raises(NotImplementedError):
    plan_lib.choose(dataclasses.replace(GEOMETRY, **changes))


# --- the kernel, interpreted or native ---------------------------------------


def _check(made, **more):
  out, lse = data.call(made, "hopper", **more)
  data.assert_right(made, out, lse)
  return out, lse


@needs_interpreter
def test_mixed_batch_with_unaligned_starts():
  """A chunk, decode rows, short prompts: every tile begins amid 8 rows."""
  _check(data.problem(
    1, query_lengths=(1, 3, 150, 1, 0, 20), lengths=(70, 3, 260, 129, 0, 31),
    T=184, N=6, K=2, H=64, p=16, dtype=jnp.bfloat16, sinks=True,
  ))


@needs_interpreter
def test_tokens_without_a_sequence_fill_many_tiles():
  """All items but two lie behind the list, some for every CTA."""
  out, lse = _check(data.problem(
    3, query_lengths=(5,), lengths=(9,), T=250, N=4, K=2, H=64, p=16,
    dtype=jnp.bfloat16,
  ))
  assert not np.asarray(out[5:], np.float32).any()
  assert np.isneginf(lse[5:]).all()


@needs_interpreter
def test_page_ids_of_the_next_item_are_its_own():
  """Several items a CTA, of other sequences, none narrow; pages of 8."""
  _check(data.problem(
    4, query_lengths=(9, 20, 5, 12), lengths=(40, 20, 33, 12), N=2, K=2, H=64,
    p=8, dtype=jnp.bfloat16, max_query_length=20,
  ))


@needs_interpreter
def test_narrow_tiles_change_no_bit():
  """Decode rows beside a prompt, for one warpgroup or for both."""
  made = data.problem(
    5, query_lengths=(140, 1, 3, 1, 0, 9), lengths=(300, 140, 33, 1, 64, 200),
    T=157, N=4, K=1, H=64, p=16, dtype=jnp.bfloat16,
  )
  geometry = dict(num_heads=4, num_kv_heads=1, head_dim=64, page_size=16,
                  dtype=jnp.bfloat16, max_query_length=157)
  results = []
  for num_tokens in (157, None):
    plan = paged_jax.plan_attention(
      made.page_table, made.lengths, made.query_starts,
      implementation="hopper", num_tokens=num_tokens, **geometry
    )
    assert plan.work.config.narrow == (num_tokens is not None)
    results.append(_check(made, plan=plan))
  data.assert_same_bits(*results)


@needs_interpreter
@pytest.mark.parametrize("H", [64, 128])
def test_logits_that_grow(H):
  """The maximum rises by more than its slack, from one unit to the next."""
  p, length = 16, 700
  made = data.problem(
    6, query_lengths=(20,), lengths=(length,), N=2, K=1, H=H, p=p,
    dtype=jnp.bfloat16,
  )
  positions = np.arange(length)
  pages = np.asarray(made.page_table)[0, positions // p]
  k = np.array(made.k_pages.astype(jnp.float32))
  growth = 7 * positions / length
  k[pages, :, positions % p] *= growth[:, None, None]
  _check(made.replace(k_pages=jnp.asarray(k, jnp.bfloat16)))


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
  "more",
  [
    dict(N=20, K=1, combined=True),  # 20 heads: two groups, one of 4
    dict(N=2, K=2, window=70, soft_cap=4.0),
    dict(N=4, K=1, causal=False, T=183),  # T is no multiple of 8
    # The window of some rows begins amid the first tile that others see whole.
    dict(query_lengths=(20,), lengths=(440,), N=2, K=1, window=300),
    # Narrow, and queries beyond the registers.
    dict(query_lengths=(9, 1, 1, 12), lengths=(9, 70, 33, 20), N=2, K=1, H=192),
  ],
)
def test_mixed_batch_variants(more):
  _check(data.problem(
    2, **dict(dict(query_lengths=(140, 1, 33), lengths=(300, 140, 33), H=64,
                   p=16, dtype=jnp.float16), **more)
  ))


@needs_interpreter
@pytest.mark.slow
def test_a_plan_changes_no_bit_nor_does_the_batch():
  made = data.problem(
    3, query_lengths=(21, 1, 13), lengths=(40, 150, 13), N=4, K=2, H=64, p=16,
    dtype=jnp.bfloat16, L=2,
  )
  want = data.call(made, "hopper", layer=jnp.int32(1))
  geometry = dict(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16,
                  dtype=jnp.bfloat16, max_query_length=35)
  for more in ({}, dict(num_tokens=35), dict(batch_invariant=True)):
    plan = paged_jax.plan_attention(
      made.page_table, made.lengths, made.query_starts,
      implementation="hopper", **geometry, **more
    )
    assert plan.work is not None
    got = data.call(made, "hopper", plan=plan, layer=jnp.int32(1))
    data.assert_same_bits(got, want)
  alone = made.replace(
    query=made.query[22:], page_table=made.page_table[2:],
    lengths=made.lengths[2:], query_starts=jnp.array([0, 13], jnp.int32),
  )
  out, lse = data.call(alone, "hopper", layer=jnp.int32(1))
  data.assert_same_bits((out, lse), tuple(x[22:] for x in want))


@needs_interpreter
def test_calls_of_one_program_do_not_meet():
  """Nothing that a call leaves behind is there for the next one to find."""
  made = data.problem(
    4, query_lengths=(30, 9), lengths=(30, 40), N=2, K=1, H=64, p=16,
    dtype=jnp.bfloat16,
  )

  def results(query):
    return [
      data.call(made.replace(query=jnp.roll(query, i, axis=0)), "hopper")
      for i in range(3)
    ]

  for got, want in zip(jax.jit(results)(made.query), results(made.query)):
    data.assert_same_bits(got, want)
