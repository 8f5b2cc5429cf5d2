"""Which work items a CTA of the Hopper prefill kernel takes.

CTA c begins with item c of the plan's list. Then whoever comes first takes the
next one: a fetching warp draws its number from a counter that all CTAs share,
two items ahead, and hands it to the other warps through shared memory. So no
CTA is idle before the list is done, whatever the items take and in whatever
order they are listed. Simulated, items go round in turn.

Behind the list come the tokens that no sequence owns, as tiles without keys.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs

_AHEAD = 4  # numbers on their way, at most
_FETCHING = 4  # warps that fetch
_PLACE = (plan.SEQUENCE, plan.BEGIN)


def scratch(config: plan.Config) -> tuple[Any, ...]:
  """Returns the shared memory and the barriers that numbers go through."""
  readers = _FETCHING + config.consumers
  return (
    mosaic.SMEM((_AHEAD,), jnp.int32),
    mosaic.Barrier(num_barriers=_AHEAD),
    mosaic.Barrier(num_arrivals=readers, num_barriers=_AHEAD),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """A tile for one kv head."""

  tile: Any  # plan row
  kv_head: Any
  done: Any  # KV tiles of this CTA before
  n: Any  # items of this CTA before that had some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
  """The items of this CTA, one after the other.

  Attributes:
    inputs: for their static facts.
    config: shape of the kernel.
    tiles: ref of `plan.Work.tiles`.
    head: ref of `plan.Work.head`.
    cta: number of this CTA.
    num_ctas: CTAs of the kernel.
    claims: the counter and what `scratch` asked for; None: items in turn.
  """

  inputs: Inputs
  config: plan.Config
  tiles: Any
  head: Any
  cta: Any
  num_ctas: int
  claims: tuple[Any, ...] | None

  def walk(
    self,
    body: Callable[..., Any],
    warps: list[Any] | None = None,
    ahead: Callable[..., Any] = lambda *place: None,
  ) -> tuple[Any, Any]:
    """Calls body for each item of this CTA.

    Args:
      body: takes an `Item`; of fetching warps also what was found ahead for it,
        and sequence and first KV tile of the next one, for which it returns
        what it found ahead.
      warps: those that the caller fetches with; None: it computes.
      ahead: sequence and first KV tile of the first item -> what is found
        ahead of it.

    Returns:
      The numbers of KV tiles and of items with some.
    """
    K = self.inputs.num_kv_heads
    listed, used = self.head[0], self.head[1]
    tokens, heads = self.config.kinds[-1]
    groups = -(-self.inputs.group_size // heads)
    beyond = self.inputs.num_tokens - used
    beyond = lax.div(jnp.maximum(beyond, 0) + (tokens - 1), jnp.int32(tokens))
    count = (listed + beyond * groups) * K

    def read(i, columns=range(plan.END + 1)):
      row = jnp.minimum(lax.div(i, jnp.int32(K)), self.tiles.shape[0] - 1)
      return tuple(self.tiles[row, j] for j in columns)

    def one(carry):
      i, r, done, n, tile, found = carry
      if warps is None:
        tile = self._listed_or_unowned(i, tile, listed, used)
      else:  # there is nothing to fetch behind the list
        end = jnp.where(i < listed * K, tile[plan.END], tile[plan.BEGIN])
        tile = (*tile[: plan.END], end)
        self._claim(r + 2, warps)
      following = self._claimed(r + 1)
      item = Item(tile=tile, kv_head=lax.rem(i, jnp.int32(K)), done=done, n=n)
      if warps is None:
        # Issued now, looked at after the item: its latency is hidden.
        tile_next = read(following)
        body(item)
      else:  # few registers: only what page ids need is read ahead
        found = body(item, found, *read(following, _PLACE))
        tile_next = read(following)
      steps = tile[plan.END] - tile[plan.BEGIN]
      n = n + jnp.where(steps > 0, 1, 0)
      return following, r + 1, done + steps, n, tile_next, found

    zero = jnp.int32(0)
    if warps is not None:
      self._claim(zero + 1, warps)
    first = read(self.cta)
    found = ahead(*read(self.cta, _PLACE))
    carry = self.cta, zero, zero, zero, first, found
    _, _, done, n, *_ = lax.while_loop(
      lambda carry: carry[0] < count, one, carry
    )
    return done, n

  def _claim(self, r, warps):
    """Has the first fetching warp draw the number of this CTA's r-th item."""
    if self.claims is None:
      return
    counter, numbers, full, free = self.claims
    slot = lax.rem(r, jnp.int32(_AHEAD))

    @pl.when(warps[0] == 0)
    def _():
      backend.wait_if(r > _AHEAD, free.at[slot])
      backend.draw(counter, numbers.at[pl.ds(slot, 1)], self.num_ctas)
      mosaic.barrier_arrive(full.at[slot])

  def _claimed(self, r):
    """Number of this CTA's r-th item."""
    if self.claims is None:
      return r * self.num_ctas + self.cta
    _, numbers, full, free = self.claims
    slot = lax.rem(r, jnp.int32(_AHEAD))
    mosaic.barrier_wait(full.at[slot])
    number = numbers[slot]
    mosaic.barrier_arrive(free.at[slot])
    return number

  def _listed_or_unowned(self, i, tile, listed, used):
    """Behind the list: tokens that no sequence owns, "of length -1"."""
    tokens, heads = self.config.kinds[-1]
    groups = -(-self.inputs.group_size // heads)
    z = lax.div(i, jnp.int32(self.inputs.num_kv_heads)) - listed
    first = used + lax.div(z, jnp.int32(groups)) * tokens
    unowned = {
      plan.TOKEN: first,
      plan.ROWS: plan.pack(
        jnp.minimum(self.inputs.num_tokens - first, tokens),
        lax.rem(z, jnp.int32(groups)) * heads,
        len(self.config.kinds) - 1,
      ),
      plan.LENGTH: jnp.int32(-1),
      plan.BEGIN: jnp.int32(0),
      plan.END: jnp.int32(0),
    }
    return [
      jnp.where(z >= 0, unowned[j], x) if j in unowned else x
      for j, x in enumerate(tile)
    ]
