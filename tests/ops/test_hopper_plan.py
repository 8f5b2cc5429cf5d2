"""The plan of `hopper` decode: who computes what, in which cuts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.ops import hopper_plan, hopper_tuning
from tests.ops.test_hopper import GEOMETRY


@pytest.mark.parametrize("num_ctas", [1, 3, 200])
@pytest.mark.parametrize(
  "cut", [hopper_tuning.EQUAL, hopper_tuning.FIXED, hopper_tuning.WHOLE]
)
@pytest.mark.parametrize(
  "lengths, queries, window",
  [
    ((40, 0, 129, 16, 2000), None, None),
    ((0, 0), None, None),
    ((0, 5, 0, 0, 300), (0, 2, 1, 0, 3), None),
    ((700, 12, 350), None, 37),
    ((90, 33), (4, 1), 16),
    ((40, 129, 16), (1, 0, 2), None),
  ],
)
def test_shares_cover_every_page_once(cut, num_ctas, lengths, queries, window):
  queries = queries or (1,) * len(lengths)
  geometry = dataclasses.replace(GEOMETRY, window=window)
  config = hopper_tuning.choose(
    geometry, len(lengths), 200, overrides=dict(cut=cut)
  )
  config = dataclasses.replace(config, cut=cut, piece=3)
  starts = np.cumsum((0, *queries)).astype(np.int32)
  work = hopper_plan.make_work(
    jnp.array(lengths, jnp.int32), jnp.asarray(starts), geometry, config,
    num_ctas, 200,
  )
  want = []
  for b, (length, query) in enumerate(zip(lengths, queries, strict=True)):
    low = max(length - query - (window or length) + 1, 0)
    # Rows without keys have a unit, so that their zeros are written.
    end = max(-(-length // 16), low // 16 + 1)
    pages = range(low // 16, end) if query else ()
    want += [
      (b, s, page) for s in range(config.segments) for page in pages
    ]
  assert work.num_ctas == num_ctas
  sequences = np.asarray(work.sequences)
  got, parts, sizes = [], [], []
  for number, share in enumerate(np.asarray(work.shares)):
    stretches = _stretches(config, number, share, sequences)
    got += [(b, s, page) for b, s, pages, _ in stretches for page in pages]
    parts += [part for *_, part in stretches]
    sizes.append(share[0])
  assert got == want
  assert sum(sizes) == (sequences[:, hopper_plan.ITEMS] * config.segments).sum()
  assert max(sizes) <= -(-sum(sizes) // num_ctas)
  if cut == hopper_tuning.WHOLE:
    assert len(parts) == sum(map(bool, queries)) * config.segments
  else:
    assert parts == sorted(set(parts))
    assert all(x < work.num_parts for x in parts)


def _stretches(config, number, share, sequences):
  """What a share holds: (sequence, segment, pages, part), in plain Python."""
  left, b, s, item, *row = share
  stretches = []
  if left:
    np.testing.assert_array_equal(row, sequences[b])
  while left:
    plan = sequences[b]
    items, units = plan[hopper_plan.ITEMS], plan[hopper_plan.UNITS]
    if config.cut == hopper_tuning.EQUAL:
      unit, part = item, number + b * config.segments + s
      taken = count = min(units - unit, left)
    else:
      unit, taken = item * plan[hopper_plan.PIECE], 1
      count = min(units - unit, plan[hopper_plan.PIECE])
      part = plan[hopper_plan.OFFSET] + s * items + item
    first = plan[hopper_plan.FIRST] + unit
    stretches.append((b, s, range(first, first + count), part))
    left, item = left - taken, item + taken
    if item == items:
      item, s = 0, s + 1
    if s == config.segments:
      b, s = plan[hopper_plan.NEXT], 0
  return stretches


@pytest.mark.parametrize(
  "B, changes, cut",
  [
    (64, dict(num_heads=64, num_kv_heads=8, window=128), hopper_tuning.WHOLE),
    (64, dict(num_heads=64, num_kv_heads=8), hopper_tuning.EQUAL),
    (64, dict(num_heads=56, num_kv_heads=8, window=128), hopper_tuning.WHOLE),
    (1, dict(num_heads=64, num_kv_heads=8, window=999), hopper_tuning.EQUAL),
  ],
)
def test_short_segments_stay_whole(B, changes, cut):
  geometry = dataclasses.replace(GEOMETRY, **changes)
  assert hopper_tuning.choose(geometry, B, 512).cut == cut
  assert hopper_tuning.choose(geometry, B, 512, decode=False).cut == (
    hopper_tuning.EQUAL
  )


@pytest.mark.parametrize(
  "B, K, want", [(64, 4, 128), (1, 8, 128), (33, 1, 132), (1, 1, 132)]
)
def test_cuts_fall_on_the_ends_of_even_segments(B, K, want):
  geometry = dataclasses.replace(GEOMETRY, num_heads=8 * K, num_kv_heads=K)
  config = hopper_tuning.choose(geometry, B, 512, overrides=dict(kb=1))
  assert hopper_tuning.num_ctas(config, B, 132) == want
