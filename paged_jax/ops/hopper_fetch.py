"""The fetching warpgroup of the Hopper decode kernel.

It runs ahead of the computing ones, by as many tiles as hopper_pace.py allows.
Its warps share the pages of a tile, a copy each in turn, for a copy costs a
warp some hundred cycles:

    a tile of 8 pages    | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
    warps                  0   1   2   3   0   1   2   3

(where a tile has fewer, the last warps have nothing to do). A warp waits until
it may go on, then copies its live pages there, K first. Page ids are read two
tiles ahead (one, where a stretch begins), so that their latency hides behind
the waits; the first ones while an earlier kernel still runs. Before all else it
asks L2 for the first tile, or a sixteenth of the share: memory is idle when a
kernel begins. Each slot has a barrier that counts copies (and their bytes) and
one that counts readers done.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_pace, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs

_WARPS = 4  # of a warpgroup


class _Side(NamedTuple):
  """What K, or V, is copied from and to, and the barriers of its slots."""

  pool: Any
  smem: Any
  full: Any
  free: Any


def fetch(
  inputs, c, walk, wait, interpret, sources, buffers, barriers, found, pace
):
  """Copies query rows and live pages into shared memory, ahead of use.

  wait: called before anything is read that an earlier kernel may write;
  found(split): called by one warp, with that of the last stretch, see
  hopper_decode.py;
  pace: how many tiles are in flight.
  """
  q_ref, k_ref, v_ref, layer_ref, k_table, *v_table = sources
  q_smem, k_smem, v_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free = barriers

  def by(warps):
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
      warps=warps,
      pace=pace,
    )

    # One without copies would be overtaken by the barriers that it waits for.
    @pl.when(warps[0] < c.copies)
    def _():
      *counts, split, carry = walk(fetching.begin, fetching.stretch)
      *_, paced = carry
      fetching.end(*counts, paced)
      fetching.first_warp(lambda: found(split))

  backend.each_warp(by, interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fetch:
  """What some fetching warps know and work with."""

  inputs: Inputs
  config: hopper_tuning.Config
  interpret: bool
  wait: Callable[[], None]
  layer: Any
  tables: tuple[Any, ...]  # K's, and V's if it has its own
  query: tuple[Any, Any, Any, Any]  # in memory, in shared memory; full, free
  k: _Side
  v: _Side
  warps: list[Any]
  pace: hopper_pace.Pace

  def begin(self, b, position, segment, high, positions):
    """Asks L2 for the first tiles of a share, and waits for earlier kernels.

    Returns:
      The page ids of the first tile, the layer, and the pace's state.
    """
    c = self.config
    layer = self.layer[0]  # may be an old one: a hint only, read again below
    bundle = lax.div(segment, jnp.int32(c.row_blocks))
    ahead = lax.div(positions, jnp.int32(hopper_tuning.PART_AHEAD * c.tokens))
    # All are read before the first one is waited for.
    starts = [position + i * c.tokens for i in range(c.ahead)]
    tiles = [self._pages(b, start) for start in starts]
    for i, (start, pages) in enumerate(zip(starts, tiles, strict=True)):
      for side, ids in self._sides(pages):

        def ask(j, page, side=side, start=start, some=(i == 0) | (i < ahead)):
          first = start + j * c.step
          source = self._part(side.pool, layer, page, bundle, first)
          backend.prefetch_if((first < high) & some, source, self.interpret)

        self._each(ids, ask)
    self.wait()
    return tiles[0], self.layer[0], self.pace.start()

  def stretch(self, at, carry):
    """Copies a stretch; its first page ids are given, the next's returned."""
    pages, layer, state = carry
    c = self.config
    bundle = lax.div(at.segment, jnp.int32(c.row_blocks))
    block = lax.rem(at.segment, jnp.int32(c.row_blocks))
    low = at.sequence[hopper_plan.LOW]
    high = jnp.minimum(at.sequence[hopper_plan.HIGH], at.end)
    self.first_warp(lambda: self._copy_queries(at, bundle, block))
    one = functools.partial(self._tile, at, layer, bundle, low, high)
    start = pages, self._ids(at, 1), state
    pages, _, state = lax.fori_loop(0, at.tiles, one, start)
    return pages, layer, state

  def end(self, tiles, stretches, state):
    """Sees every phase of the barriers it has waited for, the last ones too."""
    c = self.config
    *_, q_free = self.query

    def see():
      for i in range(c.query_slots):
        backend.wait_if(stretches > i, q_free.at[i])

    self.first_warp(see)
    for side in (self.k, self.v):
      self._wait(side, state.free, tiles)

  def _wait(self, side, first, end):
    """Waits until the slots of tiles first .. end - 1 are free again."""
    stages = jnp.int32(self.config.stages)

    def one(tile, _):
      mosaic.barrier_wait(side.free.at[lax.rem(tile, stages)])

    lax.fori_loop(first, end, one, None)

  def first_warp(self, do):
    """Calls do() in one of all fetching warps."""
    pl.when(self.warps[0] == 0)(do)

  def _copy_queries(self, at, bundle, block):
    inputs, c = self.inputs, self.config
    memory, smem, full, free = self.query
    slot = lax.rem(at.n, jnp.int32(c.query_slots))
    backend.wait_if(at.n >= c.query_slots, free.at[slot])
    token = at.sequence[hopper_plan.QUERY_START] + block * c.block_tokens
    count = 8 if c.packed else c.token_rows  # rows of a copy
    for j in range(c.block_tokens):
      row = query_row(inputs, c, token + j, bundle)
      row -= row_shift(c, row)
      for i in range(0, c.token_rows, count):
        to = j * c.token_rows + i
        mosaic.copy_gmem_to_smem(
          memory.at[pl.ds(row + i, count)],
          smem.at[slot, pl.ds(2 * to if c.packed else to, count)],
          full.at[slot],
        )

  def _tile(self, at, layer, bundle, low, high, i, carry):
    """Copies the stretch's i-th tile.

    carry: its page ids, the next one's, the pace's state.
    """
    c, step = self.config, self.config.step
    pages, following, state = carry
    then = self._ids(at, i + 2)
    position, number = at.begin + i * c.tokens, at.done + i
    slot = lax.rem(number, jnp.int32(c.stages))
    # Row blocks of a bundle read the same pages.
    once = None if c.row_blocks > 1 else jnp.array(True)
    paced = self.pace.next(state, number, self.warps[0] == 0)
    for side, ids in self._sides(pages):
      self._wait(side, state.free, paced.free)

      def copy(j, page, side=side):
        first = position + j * step
        backend.copy_if(
          (first + step > low) & (first < high),
          self._part(side.pool, layer, page, bundle, first),
          side.smem.at[slot, pl.ds(j * step * c.kb, step * c.kb)],
          side.full.at[slot],
          self.interpret,
          once,
        )

      self._each(ids, copy)
    return following, then, paced

  def _ids(self, at, i):
    """Page ids of a stretch's i-th tile; past its end, of the next's first."""
    inside = i < at.tiles
    return self._pages(
      jnp.where(inside, at.b, at.next_b),
      jnp.where(inside, at.begin + i * self.config.tokens, at.next_begin),
    )

  def _pages(self, b, position):
    """Ids of these warps' pages of a tile: K's, then V's if it has a table."""
    p, last = self.inputs.page_size, self.inputs.max_pages - 1
    at = [
      jnp.minimum(
        lax.div(position + (warp + i) * self.config.step, jnp.int32(p)), last
      )
      for warp in self.warps
      for i in range(0, self.config.copies, _WARPS)
    ]
    return tuple(tuple(table[b, i] for i in at) for table in self.tables)

  def _sides(self, pages):
    """K and V, each with its page ids."""
    return (self.k, pages[0]), (self.v, pages[-1])

  def _each(self, ids, do):
    """Calls do(j, id) for these warps' pages, the j-th ones of a tile."""
    copies, ids = self.config.copies, iter(ids)
    for warp in self.warps:
      for i in range(0, copies, _WARPS):
        one = functools.partial(do, warp + i, next(ids))
        # Of fewer than all warps, those without a page are not here.
        if (i and copies - i < _WARPS) or self.interpret:
          pl.when(warp + i < copies)(one)
        else:
          one()

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
