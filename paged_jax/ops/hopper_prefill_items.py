"""Which work items a CTA of the Hopper prefill kernel takes.

CTA c begins with item c of the plan's list. Then whoever comes first takes the
next one: a fetching warp draws its number from a counter that all CTAs share,
two items ahead, and hands it to all warps through shared memory, with the plan
row of its tile:

    r        0     1     2     3     4          the CTA's items, in 4 slots
             ^           ^                      computed; drawn meanwhile

So no CTA is idle before the list is done, whatever the items take. The row
stays there while its item lasts, and is looked up again rather than held in
registers, of which none are left; fetching warps begin an item when the one
before the last is done. Simulated, items go round in turn.

Behind the list come the tokens that no sequence owns, as tiles without keys.
Their numbers are handed on as -2, -3, ..., and -1 says that nothing is left.
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

AHEAD = 4  # slots; an item keeps its own until all are done with it
_FETCHING = 4  # warps that fetch
_COLUMNS = plan.END + 1


def scratch(config: plan.Config, interpret: bool) -> tuple[Any, ...]:
  """Returns the shared memory and the barriers that items go through."""
  readers = config.consumers + (1 if interpret else _FETCHING)
  return (
    mosaic.SMEM((AHEAD + 1,), jnp.int32),  # numbers; the last: as drawn
    mosaic.SMEM((AHEAD, plan.ROW), jnp.int32),
    mosaic.Barrier(num_arrivals=readers, num_barriers=AHEAD),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """A tile for one kv head."""

  tile: Any  # plan row
  kv_head: Any
  done: Any  # KV tiles of this CTA before
  n: Any  # items of this CTA before; those without KV tiles come last
  again: Callable[[], tuple[Any, Any]]  # looks up tile and kv_head once more
  following: Callable[[], Any]  # waits for the next item, looks it up


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
    counter: numbers are drawn from it; None: items in turn.
    shared: what `scratch` asked for.
  """

  inputs: Inputs
  config: plan.Config
  tiles: Any
  head: Any
  cta: Any
  num_ctas: int
  counter: Any
  shared: tuple[Any, ...]

  def walk(
    self,
    body: Callable[..., Any],
    warps: list[Any] | None = None,
    ahead: Callable[..., Any] = lambda *place: None,
  ) -> tuple[Any, Any]:
    """Calls body for each item of this CTA.

    Args:
      body: takes an `Item`. A computing warpgroup returns what
        `Item.following` gave it. A fetching warp calls that once too, for
        sequence and first KV tile of the next item; it also takes what was
        found ahead for its item and returns what it found for the next one.
      warps: those that the caller fetches with; None: it computes.
      ahead: sequence and first KV tile of the first item -> what is found
        ahead of it.

    Returns:
      The numbers of KV tiles and of items with some, which come first.
    """
    numbers, rows, free, full = self.shared
    first_place = (plan.SEQUENCE, plan.BEGIN)

    def slot_of(r):
      return lax.rem(r, jnp.int32(AHEAD))

    def row(r, columns=range(_COLUMNS)):
      values = tuple(rows[slot_of(r), j] for j in columns)
      if self.counter is None:  # simulated: ordered before the next copy
        mosaic.commit_smem()
      return values

    def read(r):
      number = numbers[slot_of(r)]
      return number, *self._place(number, row(r))

    def following(r):
      mosaic.barrier_wait(full.at[slot_of(r + 1)])
      return read(r + 1) if warps is None else row(r + 1, first_place)

    def one(carry):
      r, coming, done, n, found = carry
      if warps is None:
        _, tile, kv_head = coming
      else:
        self._hand_on(r + 2, self._draw, warps)
        tile, kv_head = self._place(coming[0], row(r))
      item = Item(
        tile=tile,
        kv_head=kv_head,
        done=done,
        n=r,
        again=lambda: read(r)[1:],
        following=lambda: following(r),
      )
      steps = tile[plan.END] - tile[plan.BEGIN]
      if warps is None:
        coming = body(item)
      else:
        found = body(item, found)
        coming = (numbers[slot_of(r + 1)],)
      mosaic.barrier_arrive(free.at[slot_of(r)])
      n = n + jnp.where(steps > 0, 1, 0)
      return r + 1, coming, done + steps, n, found

    zero = jnp.int32(0)
    if warps is not None:
      self._hand_on(zero, lambda _: self.cta, warps)
      self._hand_on(zero + 1, self._draw, warps)
    mosaic.barrier_wait(full.at[backend.hidden(zero, self.counter is None)])
    found = ahead(*row(zero, first_place))
    coming = read(zero) if warps is None else (numbers[0],)
    carry = zero, coming, zero, zero, found
    r, _, done, n, _ = lax.while_loop(
      lambda carry: carry[1][0] != -1, one, carry
    )
    simulated = self.counter is None
    if warps is not None or simulated:  # no copy may be under way at the end
      mosaic.barrier_wait(full.at[slot_of(r + 1)])
    if warps is not None and simulated:  # which wants all phases waited for
      for i in (2, 1):
        backend.wait_if(r >= i, free.at[slot_of(r + AHEAD - i)])
    return done, n

  def _draw(self, r):
    """Number of this CTA's r-th item, of the first fetching warp."""
    if self.counter is None:
      return r * self.num_ctas + self.cta
    numbers, *_ = self.shared
    backend.draw(self.counter, numbers.at[pl.ds(AHEAD, 1)], self.num_ctas)
    return numbers[AHEAD]

  def _hand_on(self, r, draw, warps):
    """Has the first fetching warp hand on this CTA's r-th item, draw(r)."""
    numbers, rows, free, full = self.shared
    slot = lax.rem(r, jnp.int32(AHEAD))
    K = self.inputs.num_kv_heads

    @pl.when(warps[0] == 0)
    def _():
      backend.wait_if(r >= AHEAD, free.at[slot])
      number = draw(r)
      listed = self.head[0] * K
      beyond = jnp.maximum(self.inputs.num_tokens - self.head[1], 0)
      tokens, groups = self._beyond()
      beyond = lax.div(beyond + (tokens - 1), jnp.int32(tokens)) * groups * K
      numbers[slot] = jnp.where(
        number < listed,
        number,
        jnp.where(number < listed + beyond, listed - number - 2, -1),
      )
      last = self.tiles.shape[0] - 1
      row = jnp.where(number < listed, lax.div(number, jnp.int32(K)), last)
      mosaic.copy_gmem_to_smem(
        self.tiles.at[row], rows.at[slot], full.at[slot]
      )

  def _place(self, number, tile):
    """Returns plan row and kv head of an item that was handed on."""
    tokens, groups = self._beyond()
    unowned = -2 - number
    i = jnp.maximum(number, unowned)
    z, kv_head = (f(i, jnp.int32(self.inputs.num_kv_heads))
                  for f in (lax.div, lax.rem))
    block = lax.div(z, jnp.int32(groups))
    heads = self.config.kinds[-1][1]
    first = tile[plan.TOKEN] + block * tokens
    own = jnp.minimum(self.inputs.num_tokens - first, tokens)
    changed = {
      plan.TOKEN: first,
      plan.ROWS: plan.pack(
        own, lax.rem(z, jnp.int32(groups)) * heads, len(self.config.kinds) - 1
      ),
    }
    tile = tuple(
      jnp.where(number < 0, changed[j], x) if j in changed else x
      for j, x in enumerate(tile)
    )
    return tile, kv_head

  def _beyond(self):
    """Tokens and groups of heads of tiles that no sequence owns."""
    tokens, heads = self.config.kinds[-1]
    return tokens, -(-self.inputs.group_size // heads)
