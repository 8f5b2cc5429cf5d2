"""The plan of a Hopper prefill step: tiles of queries, the longest ones first.

A tile is 64 rows a computing warpgroup, filled by some query tokens of one
sequence times some of the G query heads that share a kv head. There are three
kinds, by the query tokens that a sequence has:

    kind    tokens x heads         e.g. G = 7    for
    narrow  short, of 64 rows        8 x 7       decode rows (G up to 8)
    long    128 x 1                128 x 1       prompts and chunks
    short   as many heads as fit    16 x 7       short chunks

Packing heads is free where G is a power of two: then a long tile is a short
one. A decode row in a batch of chunks costs one tile that reads its KV once.
Narrow ones, where only one of the computing warpgroups multiplies, are there if
the batch is mixed, as far as static facts tell. They change no bit, but at H 64
where heads are not packed: there KV tiles are shorter then.

All tiles form one list; work item i is tile i // K for kv head i % K. CTA c
begins with item c, and whoever is done takes the next one. Long items come
first, so what is left at the end is small: the list is sorted by the power of
two below the KV tiles they walk, and like ones by sequence, so that CTAs at
work at the same time read the same keys and values. Light tiles, as those of
decode rows, wait for memory where others wait for the tensor cores: among like
ones they are spread evenly, so that both are busy.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.ops import hopper_tuning
from paged_jax.ops.plan import Geometry

# Columns of Work.tiles. A tile holds the tokens from `TOKEN` on, the first at
# position `AT`. `ROWS` packs (see `pack`) how many are its own, from which head
# of the group on they are computed, and the tile's kind. It walks KV tiles
# `BEGIN` .. `END` - 1 of sequence `SEQUENCE`. Positions below `LOW`, or from
# `LENGTH` on, are dead.
SEQUENCE, TOKEN, ROWS, AT, LENGTH, LOW, BEGIN, END = range(8)
ROW = 32  # columns, the others unused: a row is copied as 128 bytes

_SMEM_BYTES = 227 * 1024  # what a CTA may take on sm_90
_LIGHT = 4  # a tile with this part of all rows, or less, is light
_AHEAD = 0.9  # the others are begun that much sooner: they take longer
_UNEVEN = 4  # narrow tiles where the longest query is so many times the mean
_RESERVED = 3072  # barriers, items' rows, what the driver takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Static shape of the prefill kernel for one geometry."""

  tile: int  # positions of a KV tile
  stages: int  # tiles of K and of V in flight
  step: int  # positions that one copy brings: a page, or a tile of it
  consumers: int  # computing warpgroups, 64 rows each
  kinds: tuple[tuple[int, int], ...]  # (tokens, heads), the last one is short
  query_slots: int  # query tiles in flight
  columns: int  # columns of the output staged in shared memory at once
  registers: tuple[int, int]  # of a fetching thread, of a computing one
  query_in_registers: int  # columns that are held while an item lasts
  part: int  # positions of a unit where some row does not see all
  late: int  # columns whose weights are computed in the turn; multiple of 64
  settle: bool  # whether ptxas may not put weights off beyond a wait
  # Float32 partials of each token, by parts of the KV; 0: none, but the output.
  splits: int = 0

  @property
  def rows(self) -> int:
    return 64 * self.consumers

  @property
  def copies(self) -> int:
    return self.tile // self.step

  @property
  def narrow(self) -> bool:
    """Whether some tiles have rows for one computing warpgroup only."""
    return math.prod(self.kinds[0]) <= 64 < self.rows

  def tokens_of(self, kind: Any) -> Any:
    """Query tokens of a tile of that kind, or kinds."""
    return _pick([tokens for tokens, _ in self.kinds], kind)

  def heads_of(self, kind: Any) -> Any:
    """Query heads of a tile of that kind, or kinds."""
    return _pick([heads for _, heads in self.kinds], kind)

  def out_rows(self, num_tokens: int) -> int:
    """Token rows of the output, or of one split's partials: whole tiles."""
    if not self.splits:
      return num_tokens
    tokens, _ = self.kinds[-1]
    return -(-num_tokens // tokens) * tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The list of tiles; `head` is (tiles in use, query tokens in use).

  The last row stands for the tokens that no sequence owns, see `with_last`.
  """

  tiles: Int[Array, "tiles 32"]
  head: Int[Array, "2"]
  config: Config = dataclasses.field(metadata=dict(static=True))


def choose(
  geometry: Geometry,
  num_sequences: int = 1,
  num_tokens: int | None = None,
  *,
  batch_invariant: bool = False,
  **overrides: Any,
) -> Config:
  """Returns the kernel's shape for a geometry.

  Args:
    geometry: static facts of the call.
    num_sequences: B.
    num_tokens: T; None: unknown.
    batch_invariant: whether bits may not depend on B and T.
    **overrides: to tune: tile, stages, columns, query_slots, registers, part,
      late and settle of Config; consumers, 1 or 2; `unpacked`, not to pack
      heads; `narrow`, whether to have that kind where a tile has 8 heads or
      fewer.

  Raises:
    NotImplementedError: the kernel cannot do this geometry.
    hopper_tuning.TooFewRows: nor can it, for another kernel can.
  """
  g = geometry
  H, p, G = g.head_dim, g.page_size, g.num_heads // g.num_kv_heads
  hopper_tuning.check_geometry(g)
  if p < 8:
    raise hopper_tuning.TooFewRows(
      f"page size {p}: a copy needs 8 rows, and a tile is of one kv head"
    )
  consumers = overrides.get("consumers", 2)
  rows = 64 * consumers
  # Narrow tiles cost others some time: for batches that are mixed.
  longest = num_sequences * g.max_query_length
  mixed = num_tokens is not None and _UNEVEN * num_tokens <= longest
  kinds, packed = _kinds(
    G,
    consumers,
    narrow=overrides.get("narrow", mixed and g.window is None),
    unpacked=overrides.get("unpacked", False),
  )
  tokens, heads = kinds[-1]
  # A turn has a fixed cost besides its products and exponentials, which is much
  # where heads are small: longer turns. Not for windows, short themselves, nor
  # for tiny pages, 32 copies a tile; nor with three kinds, or more than 8
  # heads: there the fetching warps, of 24 registers, spill. Where B and T
  # decide whether there are three, bits depend on them.
  tile = 128 if H <= 128 else 64
  most_kinds = 3 if batch_invariant and not packed else len(kinds)
  if H == 64 and p >= 16 and g.window is None and most_kinds < 3 and heads <= 8:
    tile = 256
  tile = overrides.get("tile", tile)
  columns = overrides.get("columns", {192: 96, 256: 64}.get(H, H))
  query_slots = overrides.get("query_slots", 1)
  fixed = rows * (query_slots * H + columns) * 2 + _RESERVED
  most = (_SMEM_BYTES - fixed) // (2 * tile * H * 2)
  # 128 threads fetch: a + 2 b is what the register file has for 384 threads.
  # Where the computing ones hold the most, the fetching ones get the least.
  registers = (40, 232) if H > 80 and len(kinds) == 1 else (56, 224)
  if tile > 128 or H > 128:
    registers = (24, 240)
  return Config(
    tile=tile,
    stages=overrides.get("stages", min(most, 2 if tile > 128 else 4)),
    step=min(p, tile),
    consumers=consumers,
    kinds=kinds,
    query_slots=query_slots,
    columns=columns,
    registers=overrides.get("registers", registers),
    # Longer tiles leave none for them.
    query_in_registers=min(H, 128) if tile <= 128 else 0,
    # Tiles of 128 tokens, where prompts begin, see some of every part.
    part=overrides.get(
      "part", 64 if packed and tokens <= 64 else math.gcd(tile, 128)
    ),
    late=overrides.get("late", 64 if H == 64 else 0),
    # Measured at H 256, where it gains; at 64 and 128 it loses.
    settle=overrides.get("settle", H > 128),
  )


def _kinds(G, consumers, *, narrow, unpacked):
  """The kinds of tiles, see Config.kinds; whether heads are packed."""
  rows = 64 * consumers
  heads = min(G, rows // 8)
  tokens = rows // heads
  tokens = 1 << (tokens.bit_length() - 1)
  packed = tokens * heads == rows and G % heads == 0 and not unpacked
  kinds = ((tokens, heads),) if packed else ((rows, 1), (tokens, heads))
  if narrow and heads <= 8:
    kinds = ((tokens // consumers, heads), *kinds)
  return kinds, packed


def make_work(
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"],
  geometry: Geometry,
  config: Config,
  num_tokens: int | None,
) -> Work:
  """Lists the tiles of a step; traceable.

  Args:
    lengths: int32 [B], KV tokens of each sequence.
    query_starts: int32 [B+1].
    geometry: static facts of the call.
    config: shape of the kernel.
    num_tokens: T, which bounds the list; None: unknown.
  """
  B, Q = lengths.shape[0], geometry.max_query_length
  G, tile = geometry.num_heads // geometry.num_kv_heads, config.tile
  starts, stops = query_starts[:-1], query_starts[1:]
  queries = stops - starts

  def num_tiles(kind):
    tokens, heads = config.kinds[kind]
    return -(-queries // tokens) * -(-G // heads)

  # Few tiles. Of as many, narrow ones are less work and long ones waste less.
  kind = jnp.stack([num_tiles(k) for k in range(len(config.kinds))])
  kind = kind.argmin(axis=0).astype(jnp.int32)
  tokens, heads = config.tokens_of(kind), config.heads_of(kind)
  groups = -(-G // heads)
  counts = -(-queries // tokens) * groups
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  row = jnp.arange(_most_tiles(B, Q, G, config, num_tokens), dtype=jnp.int32)
  b = (ends[None, :] <= row[:, None]).sum(axis=1, dtype=jnp.int32)
  used, b = b < B, jnp.minimum(b, B - 1)
  within = row - (ends - counts)[b]
  within = counts[b] - 1 - within  # the last ones see most
  first = starts[b] + within // groups[b] * tokens[b]
  own = jnp.minimum(stops[b] - first, tokens[b])
  at = lengths[b] - stops[b] + first
  high = lengths[b]
  low = tile_low = jnp.zeros_like(high)
  if geometry.causal:
    high = jnp.clip(at + own, 0, high)
  if geometry.window is not None:
    low = jnp.maximum(lengths - queries - geometry.window + 1, 0)[b]
    tile_low = jnp.maximum(at - geometry.window + 1, 0)
  begin = tile_low // tile
  end = jnp.maximum(-(-high // tile), begin)
  columns = (
    b,
    first,
    pack(own, within % groups[b] * heads[b], kind[b]),
    at,
    lengths[b],
    low,
    begin,
    end,
  )
  tiles = jnp.stack(columns, axis=1)
  light = _LIGHT * own * heads[b] <= config.rows
  order = _order(jnp.where(used, end - begin, -1), light)
  head = jnp.stack([ends[-1], query_starts[-1]])
  tiles = with_last(tiles[order], query_starts[-1])
  return Work(tiles=tiles, head=head, config=config)


def with_last(tiles, used):
  """Appends the row of tokens that no sequence owns, "of length -1".

  tiles: int32 [tiles, 8]; used: the first such token. Returns [tiles + 1, ROW].
  """
  last = jnp.zeros((1, END + 1), jnp.int32)
  last = last.at[0, LENGTH].set(-1).at[0, TOKEN].set(used)
  tiles = jnp.concatenate([tiles, last])
  return jnp.pad(tiles, ((0, 0), (0, ROW - END - 1)))


def _order(steps, light):
  """Long tiles first; of like ones, the light ones spread among the others.

  steps: int32 [tiles], KV tiles each walks; -1: not in use, to the end.
  light: bool [tiles].
  """
  octave = lax.clz(jnp.maximum(steps, 0)) + (steps < 0)  # 0 to 33, long first
  group = 2 * octave + light
  groups = jnp.arange(2 * 34, dtype=jnp.int32)
  sizes = (group[:, None] == groups).sum(axis=0, dtype=jnp.int32)
  order = jnp.argsort(group)
  group = group[order]
  rank = jnp.arange(len(group)) - (jnp.cumsum(sizes) - sizes)[group]
  at = (rank + 0.5) / sizes[group] * jnp.where(group % 2 == 1, 1.0, _AHEAD)
  return order[jnp.argsort(group // 2 + at)]


def pack(own, head, kind, split=0):
  """One int32: own tokens, first head of the group, kind.

  split: with Config.splits, which of the partials the tile writes.
  """
  return own | head << 8 | kind << 16 | split << 18


def unpack(rows):
  """Returns (own, head, kind); see `pack`."""
  return rows & 255, rows >> 8 & 255, rows >> 16 & 3


def split_of(rows):
  """Returns the split; see `pack`."""
  return rows >> 18


def _pick(values, which):
  """values[which] of static numbers: no memory is read."""
  picked = jnp.full_like(which, values[-1])
  for i, value in enumerate(values[:-1]):
    picked = jnp.where(which == i, value, picked)
  return picked


def _most_tiles(B, Q, G, config, num_tokens):
  """A bound on the tiles: each sequence takes the kind it needs fewest of."""
  bounds = []
  for tokens, heads in config.kinds:
    bound = B * -(-Q // tokens)
    if num_tokens is not None:
      bound = min(bound, num_tokens // tokens + B)
    bounds.append(bound * -(-G // heads))
  return min(bounds)
