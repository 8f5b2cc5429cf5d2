"""The fetching warpgroup of the Hopper prefill kernel.

It runs ahead of the computing ones: waits until a slot is free, then copies the
live pages of a KV tile there, K first, then (for an item's first tile) the
queries, then V. Page ids are read one tile ahead, beyond an item's end too, so
that their latency hides behind the wait; or, where registers are fewest (narrow
tiles, or tiles of 256 positions), just before it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic


class _Side(NamedTuple):
  """What K, or V, is copied from and to, and the barriers of its slots."""

  pool: Any
  table: Any
  smem: Any
  full: Any
  free: Any


def fetch(
  inputs, c, items, interpret, layer, sources, buffers, barriers, warps
):
  """Copies queries and live pages into shared memory, ahead of use.

  Each warp of the warpgroup walks all items and makes every fourth copy: what a
  copy costs, page id and arrival, is then paid four times in parallel.
  """
  q_ref, k_ref, v_ref, k_table, *v_table = sources
  q_smem, k_smem, v_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free, *_ = barriers
  fetching = _Fetch(
    inputs=inputs,
    config=c,
    interpret=interpret,
    layer=layer,
    query=(q_ref, q_smem, q_full, q_free),
    k=_Side(k_ref, k_table, k_smem, k_full, k_free),
    v=_Side(v_ref, v_table[0] if v_table else None, v_smem, v_full, v_free),
    warps=warps,
  )
  tiles, walked = items.walk(
    fetching.one_item, warps, fetching.first_pages
  )
  # Every phase of a barrier is seen by its waiter, the last ones too.
  for free, uses in ((q_free, walked), (k_free, tiles), (v_free, tiles)):
    for i in range(c.query_slots if free is q_free else c.stages):
      hidden = backend.hidden(jnp.int32(i), interpret)
      backend.wait_if(uses > i, free.at[hidden])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fetch:
  """What some warps fetch: their part of every item's copies."""

  inputs: Any
  config: plan.Config
  interpret: bool
  layer: Any
  query: tuple[Any, Any, Any, Any]  # in memory, in shared memory; full, free
  k: _Side
  v: _Side  # its table is None where K's is for both
  warps: list[Any]

  @property
  def _ahead(self):
    """Whether page ids are read a tile ahead: where registers are left."""
    return not self.config.narrow and self.config.tile <= 128

  def first_pages(self, b, begin):
    """What is read ahead for an item: page ids of its first tile, or none."""
    return self._pages(b, begin * self.config.tile) if self._ahead else ()

  def one_item(self, item, pages):
    """Fetches an item, its first page ids given; returns those of the next."""
    begin, end = item.tile[plan.BEGIN], item.tile[plan.END]
    following = item.following() if self._ahead else None
    one = functools.partial(self._one_tile, item, following)
    # Items without KV tiles are listed last (hopper_prefill_plan._order,
    # hopper_shared): what this finds is the next one's.
    pages = lax.fori_loop(0, end - begin, one, pages)
    if not self._ahead:
      item.following()
    return pages

  def _one_tile(self, item, following, i, pages):
    c, tile = self.config, item.tile
    b, begin = tile[plan.SEQUENCE], tile[plan.BEGIN]
    position = (begin + i) * c.tile
    ids, next_pages = pages, ()
    if not self._ahead:
      ids = self._pages(b, position)
    else:
      last = i + 1 == tile[plan.END] - begin
      following_b, following_begin = following
      next_pages = self._pages(
        jnp.where(last, following_b, b),
        jnp.where(last, following_begin * c.tile, position + c.tile),
      )
    self._copy_tile(item, i, position, self.k, ids[0])
    pl.when(i == 0)(functools.partial(self._copy_queries, item))
    self._copy_tile(item, i, position, self.v, ids[1])
    return next_pages

  def _copy_tile(self, item, i, position, side, ids):
    """Copies these warps' live pages of the item's i-th KV tile."""
    inputs, c, tile = self.inputs, self.config, item.tile
    p, step, number = inputs.page_size, c.step, item.done + i
    slot = lax.rem(number, jnp.int32(c.stages))
    once = None  # whether no other tile reads these keys and values
    if c.narrow:
      once = plan.unpack(tile[plan.ROWS])[2] == 0
    ids = iter(ids)
    backend.wait_if(number >= c.stages, side.free.at[slot])

    def one(warp, j):
      # What depends on the warp is added first: constants come for free.
      at = (position + warp * step) + j * step
      live = at < tile[plan.LENGTH]
      if inputs.window is not None:
        live &= at + step > tile[plan.LOW]
      index = self.layer * inputs.num_pages + next(ids)
      index = index * inputs.num_kv_heads + item.kv_head
      source = side.pool.at[index]
      if step < p:  # a tile is part of a page
        source = side.pool.at[index, pl.ds(lax.rem(at, jnp.int32(p)), step)]
      # What the last warp has left of the tile, too.
      rest = max(c.tile - 3 * step, step)
      target = side.smem.at[slot, pl.ds(warp * step, rest)]
      target = target.at[pl.ds(j * step, step)]
      backend.copy_if(
        live, source, target, side.full.at[slot], self.interpret, once
      )

    self._each(c.copies, one)

  def _copy_queries(self, item):
    """Copies these warps' heads of the item's queries."""
    c = self.config
    _, _, _, free = self.query
    slot = lax.rem(item.n, jnp.int32(c.query_slots))
    backend.wait_if(item.n >= c.query_slots, free.at[slot])
    *_, kind = plan.unpack(item.tile[plan.ROWS])
    for k, shape in enumerate(c.kinds):
      pl.when(kind == k)(
        functools.partial(self._copy_kind, item, slot, *shape)
      )

  def _copy_kind(self, item, slot, tokens, heads):
    """Copies queries of a tile of so many tokens and heads."""
    inputs, tile = self.inputs, item.tile
    H, G = inputs.head_dim, inputs.group_size
    memory, smem, full, _ = self.query
    blocks, width, _ = backend.blocked(H, inputs.query.dtype)
    most = max(heads for _, heads in self.config.kinds)
    first = tile[plan.TOKEN]
    _, first_head, _ = plan.unpack(tile[plan.ROWS])

    def one(warp, i):
      j = warp + i
      head = item.kv_head * G + jnp.minimum(first_head + j, G - 1)
      for block in range(blocks):
        columns = pl.ds(head * H + block * width, width)
        mosaic.copy_gmem_to_smem(
          memory.at[pl.ds(first, tokens), columns],
          smem.at[slot, block, pl.ds(j * tokens, tokens)],
          full.at[slot],
        )

    def none(*_):
      for _ in range(blocks):
        mosaic.barrier_arrive(full.at[slot])

    self._each(heads, one)
    if most > heads:
      self._each(most - heads, none)

  def _pages(self, b, position):
    """Page ids of K and of V that these warps copy of a tile."""
    p, last = self.inputs.page_size, self.inputs.max_pages - 1
    step, k_table, v_table = self.config.step, self.k.table, self.v.table
    at = [
      jnp.minimum(lax.div((position + warp * step) + i * step, jnp.int32(p)),
                  last)
      for warp in self.warps
      for i in range(0, self.config.copies, 4)
    ]
    k = tuple(k_table[b, i] for i in at)
    return k, k if v_table is None else tuple(v_table[b, i] for i in at)

  def _each(self, count, do):
    """Calls do(warp, i) for the share, warp + i, of 0 .. count - 1."""
    for warp in self.warps:
      for i in range(0, count, 4):
        if count - i >= 4:
          do(warp, i)
        else:
          pl.when(i + warp < count)(functools.partial(do, warp, i))
