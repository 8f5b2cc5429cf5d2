"""The fetching warpgroup of the Hopper prefill kernel.

It runs ahead of the computing ones: waits until a slot is free, then copies the
live pages of a KV tile there, K first, then (for an item's first tile) the
queries, then V. Page ids are read one tile ahead, beyond an item's end too, so
that their latency hides behind the wait; or, where registers are fewest (narrow
tiles, or tiles of 256 positions), just before it.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic


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
  p, M, H, step = inputs.page_size, inputs.max_pages, inputs.head_dim, c.step
  K, G = inputs.num_kv_heads, inputs.group_size
  most = max(heads for _, heads in c.kinds)
  blocks, width, _ = backend.blocked(H, inputs.query.dtype)
  # Whether page ids are read a tile ahead, where registers are left for them.
  ahead = not c.narrow and c.tile <= 128

  def each(count, do):
    """Calls do(warp, i) for this warp's share, warp + i, of 0 .. count - 1."""
    for warp in warps:
      for i in range(0, count, 4):
        if count - i >= 4:
          do(warp, i)
        else:
          pl.when(i + warp < count)(functools.partial(do, warp, i))

  def pages_at(b, position):
    at = [
      jnp.minimum(
        lax.div((position + warp * step) + i * step, jnp.int32(p)), M - 1
      )
      for warp in warps
      for i in range(0, c.copies, 4)
    ]
    k = tuple(k_table[b, i] for i in at)
    return k, tuple(v_table[0][b, i] for i in at) if v_table else k

  def queries(tile, kv_head, slot, tokens, heads):
    first = tile[plan.TOKEN]
    _, first_head, _ = plan.unpack(tile[plan.ROWS])

    def one(warp, i):
      j = warp + i
      head = kv_head * G + jnp.minimum(first_head + j, G - 1)
      for block in range(blocks):
        columns = pl.ds(head * H + block * width, width)
        mosaic.copy_gmem_to_smem(
          q_ref.at[pl.ds(first, tokens), columns],
          q_smem.at[slot, block, pl.ds(j * tokens, tokens)],
          q_full.at[slot],
        )

    def none(*_):
      for _ in range(blocks):
        mosaic.barrier_arrive(q_full.at[slot])

    each(heads, one)
    if most > heads:
      each(most - heads, none)

  def first_pages(b, begin):
    return pages_at(b, begin * c.tile) if ahead else ()

  def fetch_item(item, pages):
    tile, kv_head, done, n = item.tile, item.kv_head, item.done, item.n
    b, begin = tile[plan.SEQUENCE], tile[plan.BEGIN]
    steps = tile[plan.END] - begin
    if ahead:
      following_b, following_begin = item.following()
    once = None  # whether no other tile reads these keys and values
    if c.narrow:
      once = plan.unpack(tile[plan.ROWS])[2] == 0

    def one_tile(i, pages):
      position = (begin + i) * c.tile
      slot = lax.rem(done + i, jnp.int32(c.stages))
      ids, next_pages = pages, ()
      if not ahead:
        ids = pages_at(b, position)
      else:
        last = i + 1 == steps
        next_pages = pages_at(
          jnp.where(last, following_b, b),
          jnp.where(last, following_begin * c.tile, position + c.tile),
        )

      def copy(pool, smem, full, free, ids):
        ids = iter(ids)
        backend.wait_if(done + i >= c.stages, free.at[slot])

        def one(warp, i):
          # What depends on the warp is added first: constants come for free.
          at = (position + warp * step) + i * step
          live = at < tile[plan.LENGTH]
          if inputs.window is not None:
            live &= at + step > tile[plan.LOW]
          index = (layer * inputs.num_pages + next(ids)) * K + kv_head
          source = pool.at[index]
          if step < p:  # a tile is part of a page
            source = pool.at[index, pl.ds(lax.rem(at, jnp.int32(p)), step)]
          # What the last warp has left of the tile, too.
          rest = max(c.tile - 3 * step, step)
          target = smem.at[slot, pl.ds(warp * step, rest)]
          target = target.at[pl.ds(i * step, step)]
          backend.copy_if(
            live, source, target, full.at[slot], interpret, once
          )

        each(c.copies, one)

      copy(k_ref, k_smem, k_full, k_free, ids[0])

      @pl.when(i == 0)
      def _():
        q_slot = lax.rem(n, jnp.int32(c.query_slots))
        backend.wait_if(n >= c.query_slots, q_free.at[q_slot])
        *_, kind = plan.unpack(tile[plan.ROWS])
        for k, (tokens, heads) in enumerate(c.kinds):
          pl.when(kind == k)(
            functools.partial(queries, tile, kv_head, q_slot, tokens, heads)
          )

      copy(v_ref, v_smem, v_full, v_free, ids[1])
      return next_pages

    # Items without KV tiles are listed last (hopper_prefill_plan._order,
    # hopper_shared): what this finds is the next one's.
    pages = lax.fori_loop(0, steps, one_tile, pages)
    if not ahead:
      item.following()
    return pages

  tiles, items = items.walk(fetch_item, warps, first_pages)
  # Every phase of a barrier is seen by its waiter, the last ones too.
  for free, uses in ((q_free, items), (k_free, tiles), (v_free, tiles)):
    for i in range(c.query_slots if free is q_free else c.stages):
      hidden = backend.hidden(jnp.int32(i), interpret)
      backend.wait_if(uses > i, free.at[hidden])
