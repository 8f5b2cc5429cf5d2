"""What an item of the Hopper prefill kernel walks: units of keys and values.

A unit is a KV tile that all rows see whole, or a part of one that some row does
not; parts that no row sees are left out (without causal, tokens before position
0 count as if they saw some). With tiles of 128, parts of 64, and 32
query tokens from position 288 on, causal:

    position  0          128         256    320
              |   whole   |   whole   | part |  not walked
                                       ^ masked

A unit is one turn on the tensor cores, so all computing warpgroups walk the
same ones, whatever their rows see.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from jax import lax
import jax.numpy as jnp

from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.inputs import Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """Positions `position` .. `position + width - 1` of a KV tile."""

  position: Any
  width: int
  tile: Any
  opens: Any  # whether it is the first one of its tile
  closes: Any  # whether it is the last one of its tile
  ends: Any  # whether it is the last one of its item


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
  """Units `first` .. `last` - 1, counted from position 0 in their width."""

  first: Any
  last: Any
  width: int
  masked: bool  # whether some row may not see some position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
  """The units of one plan row, `tile`."""

  inputs: Inputs
  config: plan.Config
  tile: Any

  def stretches(self) -> Iterator[Stretch]:
    """Yields the stretches in order; any of them may be empty."""
    size, width = self.config.tile, self.config.part
    parts = size // width
    start, stop = self._whole_tiles()
    end = lax.div(self._end(), jnp.int32(width))
    if self.inputs.window is not None:
      first = lax.div(self._begin(), jnp.int32(width))
      last = jnp.minimum(start * parts, end)
      yield Stretch(first=first, last=last, width=width, masked=True)
    yield Stretch(first=start, last=stop, width=size, masked=False)
    yield Stretch(first=stop * parts, last=end, width=width, masked=True)

  def unit(self, i: Any, width: int) -> Unit:
    """Returns unit i of a stretch."""
    parts = self.config.tile // width
    position = i * width
    ends = position + width == self._end()
    tile, opens, closes = i, True, True
    if parts > 1:
      tile, part = lax.div(i, jnp.int32(parts)), lax.rem(i, jnp.int32(parts))
      opens = part == 0
      if self.inputs.window is not None:
        opens |= position == self._begin()
      closes = (part == parts - 1) | ends
    return Unit(
      position=position,
      width=width,
      tile=tile,
      opens=opens,
      closes=closes,
      ends=ends,
    )

  def _begin(self):
    """The first position walked, where a part begins."""
    width = self.config.part
    begin = self.tile[plan.BEGIN] * self.config.tile
    if self.inputs.window is None:
      return begin
    low = self.tile[plan.AT] - (self.inputs.window - 1)
    low = lax.div(jnp.maximum(low, 0), jnp.int32(width)) * width
    return jnp.clip(low, begin, self._end())

  def _end(self):
    """Behind the last position walked, where a part ends."""
    size, width = self.config.tile, self.config.part
    own, _, _ = plan.unpack(self.tile[plan.ROWS])
    seen = self.tile[plan.LENGTH]
    if self.inputs.causal:
      seen = jnp.minimum(seen, self.tile[plan.AT] + own)
    end = lax.div(seen + (width - 1), jnp.int32(width)) * width
    return jnp.clip(
      end, self.tile[plan.BEGIN] * size, self.tile[plan.END] * size
    )

  def _whole_tiles(self):
    """First, and past the last, of the KV tiles that all rows see whole."""
    tile, size = self.tile, self.config.tile
    begin, end, at = (tile[j] for j in (plan.BEGIN, plan.END, plan.AT))
    own, _, _ = plan.unpack(tile[plan.ROWS])
    seen = tile[plan.LENGTH]
    if self.inputs.causal:
      seen = jnp.minimum(seen, at + 1)
    elif self.inputs.max_query_length > 1:
      seen = jnp.where(at < 0, 0, seen)
    stop = lax.div(jnp.maximum(seen, 0), jnp.int32(size))
    stop = jnp.clip(stop, begin, end)
    if self.inputs.window is None:
      return begin, stop
    low = jnp.maximum(at + own - self.inputs.window, 0)
    start = jnp.clip(lax.div(low + (size - 1), jnp.int32(size)), begin, end)
    return start, jnp.maximum(stop, start)
