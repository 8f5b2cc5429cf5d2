"""Keeps the CTAs of a Hopper decode kernel abreast of each other.

Memory does not serve all multiprocessors alike, and the more is in flight, the
less so. Those it favours are done early, and the others, when they are few, too
few to keep it busy. So only a CTA that is not ahead has all it can in flight:

    tiles of a CTA      0 1 |  2 3   | 4 5 | 6 7 | ...
    it counts             ^      ^       ^     ^
    in flight         least | stages | least if it is ahead, else stages

All count in one number in global memory, which nobody clears first: how far it
has come since a CTA has counted first is what matters. A CTA is ahead if it has
counted more often since then than all do on average (those without work, or
done, are among them: next to them everyone is ahead). Nothing but time depends
on it, so no result does.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_tuning

EVERY = 2  # tiles; a CTA counts then


class State(NamedTuple):
  """Int32 scalars of a fetching warp, all 0 at first."""

  free: Any  # tiles, the first ones, whose slots it has seen free again
  first: Any  # the number of all, when it was looked at first
  last: Any  # likewise, last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """How many tiles a CTA's fetching warps have in flight."""

  config: hopper_tuning.Config
  counter: Any  # as `memory` says, or None: as many as there are stages
  num_ctas: int

  def start(self) -> State:
    """Returns a warp's state before the first tile."""
    return State(*[jnp.int32(0)] * len(State._fields))

  def next(self, state: State, tile: Any, counts: Any) -> State:
    """Returns a warp's state in which it may copy a tile.

    Those that are not `free` in `state`, but in the new one, it waits for.

    Args:
      state: after the tile before.
      tile: its number in this CTA, int32 scalar.
      counts: whether this is the CTA's warp that counts.
    """
    c = self.config
    depth = jnp.int32(c.stages)
    if self.counter is not None:
      times = lax.div(tile, jnp.int32(EVERY))  # it has counted
      own = (times - 1) * self.num_ctas
      behind = (times > 0) & (own <= state.last - state.first)
      depth = jnp.where(behind, c.stages, c.least)
      now = lax.rem(tile, jnp.int32(EVERY)) == EVERY - 1
      # What it says is for the next tile on.
      last = backend.count(self.counter, now, counts, state.last)
      first = jnp.where(times == 0, last, state.first)
      state = State(state.free, first, last)
    return state._replace(free=jnp.maximum(state.free, tile + 1 - depth))


def memory() -> jax.ShapeDtypeStruct:
  """Returns what the number takes."""
  return jax.ShapeDtypeStruct((1,), jnp.int32)
