"""How many tiles a CTA of the Hopper decode kernel has in flight."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.ops import backend, hopper_pace, hopper_tuning
from paged_jax.ops.plan import Geometry

GEOMETRY = Geometry(
  num_heads=32, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16",
  max_query_length=1, causal=True, window=None, combined=False,
)


def test_long_shares_are_paced():
  config = hopper_tuning.choose(GEOMETRY, 64, 512)
  assert config.paced and config.least >= 2
  assert hopper_tuning.choose(GEOMETRY, 64, 512, batch_invariant=True).paced


@pytest.mark.parametrize(
  "changes, batch, cut",
  [
    ({}, 1, hopper_tuning.EQUAL),  # 8 tiles a CTA
    (dict(window=128), 64, hopper_tuning.EQUAL),  # likewise
    (dict(window=64), 256, hopper_tuning.WHOLE),
    (dict(head_dim=256), 64, hopper_tuning.EQUAL),  # no room for another tile
  ],
)
def test_others_are_not(changes, batch, cut):
  geometry = dataclasses.replace(GEOMETRY, **changes)
  config = hopper_tuning.choose(geometry, batch, 512)
  assert config.cut == cut
  assert config.least == config.stages == 2


@pytest.mark.parametrize("window", [1, 16, 17, 128, 130])
@pytest.mark.parametrize("p, Q", [(16, 1), (16, 4), (64, 4), (1, 8)])
def test_no_window_covers_more_pages_than_the_bound(window, p, Q):
  geometry = dataclasses.replace(
    GEOMETRY, window=window, page_size=p, max_query_length=Q
  )
  most = max(
    (first + window + Q - 2) // p - first // p + 1 for first in range(p)
  )
  assert hopper_tuning._longest(geometry, 512) == most * p


@pytest.mark.parametrize("number", [0, 2**31 - 40, -12])
def test_who_is_ahead_has_less_in_flight(number, monkeypatch):
  """CTAs of three speeds; the number of all begins anywhere, and may wrap."""
  config = hopper_tuning.choose(GEOMETRY, 64, 512)
  total = np.array(number, np.int32)

  def count(ref, now, raises, before):
    assert ref == "the number"
    with np.errstate(over="ignore"):
      np.add(total, np.int32(now and raises), out=total)
    return jnp.int32(total) if now else before

  monkeypatch.setattr(backend, "count", count)
  pace = hopper_pace.Pace(config=config, counter="the number", num_ctas=3)
  states = [pace.start()] * 3
  tiles, depths = [0] * 3, [[] for _ in range(3)]
  for turn in range(24):
    for cta, speed in enumerate((1, 2, 3)):
      if turn % 3 < speed:
        old, tile = states[cta], jnp.int32(tiles[cta])
        new = pace.next(old, tile, True)
        assert old.free <= new.free <= tile  # a tile that was copied before
        depth = int(tile + 1 - new.free)
        assert depth <= config.stages  # its slot is free
        depths[cta].append(depth)
        states[cta], tiles[cta] = new, tiles[cta] + 1
  slow, _, fast = (set(d[6:]) for d in depths)
  assert slow == {config.stages} and fast == {config.least}
  for depth in depths:  # nobody is ahead yet
    assert max(depth[: hopper_pace.EVERY]) <= config.least


def test_one_speed_for_all_without_a_number():
  config = hopper_tuning.choose(GEOMETRY, 64, 512)
  pace = hopper_pace.Pace(config=config, counter=None, num_ctas=3)
  state = pace.start()
  for tile in range(6):
    state = pace.next(state, jnp.int32(tile), True)
    assert state.free == max(tile + 1 - config.stages, 0)
