"""The fetching warpgroup of the Hopper decode kernel.

It runs ahead of the computing ones by `stages` tiles: waits until a slot is
free, then copies the live pages of a tile there, K first. Page ids are read one
tile ahead, so that their latency hides behind the wait; the first ones while an
earlier kernel still runs. Before all else it asks L2 for the first tile, or a
sixteenth of its share: memory is idle when a kernel begins. Each slot has a
barrier that counts copies (and their bytes) and one that counts readers done.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


class _Side(NamedTuple):
  """What K, or V, is copied from and to, and the barriers of its slots."""

  pool: Any
  smem: Any
  full: Any
  free: Any


def fetch(inputs, c, walk, wait, interpret, sources, buffers, barriers):
  """Copies query rows and live pages into shared memory, ahead of use.

  wait: called before anything is read that an earlier kernel may write.

  Returns:
    `split` of the last stretch, see hopper_decode.py.
  """
  q_ref, k_ref, v_ref, layer_ref, k_table, *v_table = sources
  q_smem, k_smem, v_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free = barriers
  fetching = _Fetch(
    inputs=inputs,
    config=c,
    interpret=interpret,
    wait=wait,
    layer=layer_ref,
    tables=(k_table, *v_table),
    query=(q_ref, q_smem, q_full, q_free),
    k=_Side(k_ref, k_smem, k_full, k_free),
    v=_Side(v_ref, v_smem, v_full, v_free),
  )
  tiles, segments, split = walk(fetching.begin, fetching.stretch)
  # Every phase of a barrier is seen by its waiter, the last ones too.
  for free, uses in ((q_free, segments), (k_free, tiles), (v_free, tiles)):
    for i in range(c.query_slots if free is q_free else c.stages):
      backend.wait_if(uses > i, free.at[i])
  return split


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fetch:
  """What the fetching warpgroup knows and works with."""

  inputs: Inputs
  config: hopper_tuning.Config
  interpret: bool
  wait: Callable[[], None]
  layer: Any
  tables: tuple[Any, ...]  # K's, and V's if it has its own
  query: tuple[Any, Any, Any, Any]  # in memory, in shared memory; full, free
  k: _Side
  v: _Side

  def begin(self, b, position, segment, high, positions):
    """Asks L2 for the first tiles of a share, and waits for earlier kernels.

    Returns:
      The page ids of the first tile, and the layer.
    """
    c = self.config
    layer = self.layer[0]  # may be an old one: a hint only, read again below
    bundle = lax.div(segment, jnp.int32(c.row_blocks))
    ahead = lax.div(positions, jnp.int32(hopper_tuning.PART_AHEAD * c.tokens))
    tiles = []
    for i in range(c.ahead):
      here = position + i * c.tokens
      pages = self._pages(b, here)
      tiles.append(pages)
      for side, ids in self._sides(pages):
        for j, page in enumerate(ids):
          first = here + j * c.step
          live = (first < high) & ((i == 0) | (i < ahead))
          source = self._part(side.pool, layer, page, bundle, first)
          backend.prefetch_if(live, source, self.interpret)
    self.wait()
    return tiles[0], self.layer[0]

  def stretch(self, at, carry):
    """Copies a stretch; its first page ids are given, the next's returned."""
    pages, layer = carry
    c = self.config
    bundle = lax.div(at.segment, jnp.int32(c.row_blocks))
    block = lax.rem(at.segment, jnp.int32(c.row_blocks))
    low = at.sequence[hopper_plan.LOW]
    high = jnp.minimum(at.sequence[hopper_plan.HIGH], at.end)
    self._copy_queries(at, bundle, block)
    one = functools.partial(self._tile, at, layer, bundle, low, high)
    return lax.fori_loop(0, at.tiles, one, pages), layer

  def _copy_queries(self, at, bundle, block):
    inputs, c = self.inputs, self.config
    memory, smem, full, free = self.query
    slot = lax.rem(at.n, jnp.int32(c.query_slots))
    backend.wait_if(at.n >= c.query_slots, free.at[slot])
    token = at.sequence[hopper_plan.QUERY_START] + block * c.block_tokens
    for j in range(c.block_tokens):
      row = query_row(inputs, c, token + j, bundle)
      mosaic.copy_gmem_to_smem(
        memory.at[pl.ds(row - row_shift(c, row), c.token_rows)],
        smem.at[slot, pl.ds(j * c.token_rows, c.token_rows)],
        full.at[slot],
      )

  def _tile(self, at, layer, bundle, low, high, i, pages):
    """Copies the stretch's i-th tile; returns the page ids of the next."""
    c, step = self.config, self.config.step
    position = at.begin + i * c.tokens
    slot = lax.rem(at.done + i, jnp.int32(c.stages))
    last = i + 1 == at.tiles
    following = self._pages(
      jnp.where(last, at.next_b, at.b),
      jnp.where(last, at.next_begin, position + c.tokens),
    )
    # Row blocks of a bundle read the same pages.
    once = None if c.row_blocks > 1 else jnp.array(True)
    for side, ids in self._sides(pages):
      backend.wait_if(at.done + i >= c.stages, side.free.at[slot])
      for j, page in enumerate(ids):
        first = position + j * step
        live = (first + step > low) & (first < high)
        backend.copy_if(
          live,
          self._part(side.pool, layer, page, bundle, first),
          side.smem.at[slot, pl.ds(j * step * c.kb, step * c.kb)],
          side.full.at[slot],
          self.interpret,
          once,
        )
    return following

  def _pages(self, b, position):
    """Page ids of a tile: K's, then V's if it has a table of its own."""
    p, last = self.inputs.page_size, self.inputs.max_pages - 1
    at = [
      jnp.minimum(lax.div(position + j * self.config.step, jnp.int32(p)), last)
      for j in range(self.config.copies)
    ]
    return tuple(table[b, i] for table in self.tables for i in at)

  def _sides(self, pages):
    """K and V, each with its page ids."""
    copies = self.config.copies
    return (self.k, pages[:copies]), (self.v, pages[-copies:])

  def _part(self, pool, layer, page, bundle, position):
    """What one copy brings: a bundle of a page, or positions of it."""
    p, step = self.inputs.page_size, self.config.step
    # An int32 is enough: 2**31 tiles of 1 KiB or more fit no GPU.
    index = layer * self.inputs.num_pages + page
    index = index * self.config.bundles + bundle
    if step == p:
      return pool.at[index]
    # A tile is part of a page (kb is 1).
    return pool.at[index, pl.ds(lax.rem(position, jnp.int32(p)), step)]


def query_row(inputs: Inputs, c: hopper_tuning.Config, token, bundle):
  """Row of query [T * N, H] where a bundle's heads of a token begin."""
  token = jnp.minimum(token, inputs.num_tokens - 1)
  return token * inputs.num_heads + bundle * c.heads


def row_shift(c: hopper_tuning.Config, row):
  """How far into the copied group of 8 rows `row` lies."""
  if c.heads % 8 == 0:
    return 0
  return row & 7
