"""The fetching warpgroup of the Hopper decode kernel.

It runs ahead of the computing ones by `stages` tiles: waits until a slot is
free, then copies the live pages of a tile there, K first. Page ids are read one
tile ahead, so that their latency hides behind the wait; the first ones while an
earlier kernel still runs. Before all else it asks L2 for the first tile, or a
sixteenth of its share: memory is idle when a kernel begins. Each slot has a
barrier that counts copies (and their bytes) and one that counts readers done.
"""

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


def fetch(inputs, c, walk, wait, interpret, sources, buffers, barriers):
  """Copies query rows and live pages into shared memory, ahead of use."""
  q_ref, k_ref, v_ref, layer_ref, k_table, *v_table = sources
  q_smem, k_smem, v_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free = barriers
  p, M = inputs.page_size, inputs.max_pages
  step = c.step
  # Row blocks of a bundle read the same pages.
  once = None if c.row_blocks > 1 else jnp.array(True)

  def pages_at(b, position):
    at = [
      jnp.minimum(lax.div(position + j * step, jnp.int32(p)), M - 1)
      for j in range(c.copies)
    ]
    k = tuple(k_table[b, i] for i in at)
    return k + tuple(table[b, i] for table in v_table for i in at)

  def part(pool, layer, page, bundle, position):
    """What one copy brings: a bundle of a page, or positions of it."""
    # An int32 is enough: 2**31 tiles of 1 KiB or more fit no GPU.
    index = (layer * inputs.num_pages + page) * c.bundles + bundle
    if step == p:
      return pool.at[index]
    # A tile is part of a page (kb is 1).
    return pool.at[index, pl.ds(lax.rem(position, jnp.int32(p)), step)]

  def begin(b, position, segment, high, share):
    """Asks L2 for the first tiles of a share, and waits for earlier kernels."""
    layer = layer_ref[0]  # may be an old one: a hint only, read again below
    bundle = lax.div(segment, jnp.int32(c.row_blocks))
    ahead = lax.div(share, jnp.int32(hopper_tuning.PART_AHEAD * c.tokens))
    tiles = []
    for i in range(c.ahead):
      here = position + i * c.tokens
      pages = pages_at(b, here)
      tiles.append(pages)
      for pool, ids in (
        (k_ref, pages[: c.copies]), (v_ref, pages[-c.copies :])
      ):
        for j, page in enumerate(ids):
          first = here + j * step
          live = (first < high) & ((i == 0) | (i < ahead))
          backend.prefetch_if(
            live, part(pool, layer, page, bundle, first), interpret
          )
    wait()
    return tiles[0], layer_ref[0]

  def stretch(at, carry):
    pages, layer = carry
    b, s, sequence, begin, tiles, done, n = (
      at.b, at.segment, at.sequence, at.begin, at.tiles, at.done, at.n
    )
    bundle = lax.div(s, jnp.int32(c.row_blocks))
    block = lax.rem(s, jnp.int32(c.row_blocks))
    low = sequence[hopper_plan.LOW]
    high = jnp.minimum(sequence[hopper_plan.HIGH], at.end)
    slot = lax.rem(n, jnp.int32(c.query_slots))

    backend.wait_if(n >= c.query_slots, q_free.at[slot])
    token = sequence[hopper_plan.QUERY_START] + block * c.block_tokens
    for j in range(c.block_tokens):
      row = query_row(inputs, c, token + j, bundle)
      mosaic.copy_gmem_to_smem(
        q_ref.at[pl.ds(row - row_shift(c, row), c.token_rows)],
        q_smem.at[slot, pl.ds(j * c.token_rows, c.token_rows)],
        q_full.at[slot],
      )

    def one_tile(i, pages):
      position = begin + i * c.tokens
      slot = lax.rem(done + i, jnp.int32(c.stages))
      last = i + 1 == tiles
      following = pages_at(
        jnp.where(last, at.next_b, b),
        jnp.where(last, at.next_begin, position + c.tokens),
      )
      for pool, smem, full, free, ids in (
        (k_ref, k_smem, k_full, k_free, pages[: c.copies]),
        (v_ref, v_smem, v_full, v_free, pages[-c.copies :]),
      ):

        backend.wait_if(done + i >= c.stages, free.at[slot])
        for j, page in enumerate(ids):
          first = position + j * step
          live = (first + step > low) & (first < high)
          source = part(pool, layer, page, bundle, first)
          target = smem.at[slot, pl.ds(j * step * c.kb, step * c.kb)]
          backend.copy_if(
            live, source, target, full.at[slot], interpret, once
          )
      return following

    pages = lax.fori_loop(0, tiles, one_tile, pages)
    if c.cut == hopper_tuning.WHOLE:  # which may have no tiles
      ahead = pages_at(at.next_b, at.next_begin)
      pages = tuple(
        jnp.where(tiles > 0, x, y) for x, y in zip(pages, ahead, strict=True)
      )
    return pages, layer

  tiles, segments = walk(begin, stretch)
  # Every phase of a barrier is seen by its waiter, the last ones too.
  for free, uses in ((q_free, segments), (k_free, tiles), (v_free, tiles)):
    for i in range(c.query_slots if free is q_free else c.stages):
      backend.wait_if(uses > i, free.at[i])


def query_row(inputs: Inputs, c: hopper_tuning.Config, token, bundle):
  """Row of query [T * N, H] where a bundle's heads of a token begin."""
  token = jnp.minimum(token, inputs.num_tokens - 1)
  return token * inputs.num_heads + bundle * c.heads


def row_shift(c: hopper_tuning.Config, row):
  """How far into the copied group of 8 rows `row` lies."""
  if c.heads % 8 == 0:
    return 0
  return row & 7
