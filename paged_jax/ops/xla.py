"""Paged attention in plain jnp: blockwise online softmax over a tile list.

The work is cut into segments, a block of `rows` query tokens of one sequence,
and each segment's keys into tiles of a few pages. Tiles of all segments form
one flat list; W lanes walk it, each a contiguous share, equal to one tile, and
a tile per lane and iteration is gathered from the pool and folded in:

    segments      0 0 0 0 0 1 2 2 2 2 2 2 3         tiles of ragged lengths
    lanes (W=3)   0 0 0 0|1 1 1 1|2 2 2 2 2         ceil(13 / 3) iterations

    m' = max(m, s)                            s: the tile's logits
    l' = l e^(m - m') + sum e^(s - m')
    o' = o e^(m - m') + e^(s - m') v          out = o / l, lse = m + log l

So time follows the live tokens, not B * M * p, one long row among short ones
is shared by all lanes, and no more than W tiles are ever gathered at a time.
Segment s in lane w keeps (m, l, o) in row w + s, which no other pair has: the
rows of a segment are neighbours, and are merged pairwise at the end.

Sequences with one query token get segments of one row, all others of
`_block_rows`: decode rows in a mixed batch do not pay for prefill's blocks.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops.inputs import Inputs


def attend(
  inputs: Inputs, *, plan: Any = None, interpret: bool = False
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token."""
  del plan, interpret  # Plain jnp: nothing to plan, nothing to interpret.
  T, N, H = inputs.query.shape
  dtype = inputs.accumulator_dtype
  out = jnp.zeros((T, N, H), inputs.query.dtype)
  lse = jnp.full((T, N), -jnp.inf, dtype)
  if 0 in (T, inputs.num_sequences):
    return out, lse
  starts = jnp.clip(inputs.query_starts, 0, T)
  counts = starts[1:] - starts[:-1]  # query tokens of each sequence
  if inputs.max_query_length > 1:
    rows = _block_rows(inputs)
    blocks = _blocks(inputs, starts, jnp.where(counts > 1, counts, 0), rows)
    block_out, block_lse = _segments(inputs, blocks, rows)
    # Token t is row t - starts[b] of its sequence's blocks.
    token = jnp.arange(T)
    b = jnp.sum(starts[1:] <= token[:, None], axis=-1)
    mine = b < inputs.num_sequences
    b = jnp.minimum(b, inputs.num_sequences - 1)
    mine &= counts[b] > 1
    j = token - starts[b]
    first = jnp.searchsorted(blocks.sequence, b, method="compare_all")
    at = (first + j // rows, j % rows)
    out = jnp.where(mine[:, None, None], block_out[at], 0)
    lse = jnp.where(mine[:, None], block_lse[at], -jnp.inf)
  single = _Segments(
    sequence=jnp.arange(inputs.num_sequences),
    start=starts[:-1],
    count=jnp.where(counts == 1, 1, 0),
    end=starts[1:],
  )
  one_out, one_lse = _segments(inputs, single, 1)
  if inputs.decode:
    return one_out[:, 0], one_lse[:, 0]
  at = jnp.where(counts == 1, starts[:-1], T)
  out = out.at[at].set(one_out[:, 0], mode="drop")
  return out, lse.at[at].set(one_lse[:, 0], mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
  """S blocks of query tokens, each of one sequence."""

  sequence: Int[Array, "S"]  # b, never falling
  start: Int[Array, "S"]  # first query token
  count: Int[Array, "S"]  # query tokens; 0 = nothing to do
  end: Int[Array, "S"]  # query_starts[b + 1]


def _block_rows(inputs: Inputs) -> int:
  """Query tokens a segment: some 256 rows of a matrix product with G."""
  rows = max(1, 256 // inputs.group_size)
  return min(rows, inputs.max_query_length)


def _blocks(inputs, starts, counts, rows) -> _Segments:
  """Cuts sequences into blocks of `rows` query tokens."""
  T, B = inputs.num_tokens, inputs.num_sequences
  per_sequence = -(-inputs.max_query_length // rows)
  size = min(B * per_sequence, (T + B * (rows - 1)) // rows)
  blocks = (counts + rows - 1) // rows
  ends = jnp.cumsum(blocks)
  s = jnp.arange(size)
  b = jnp.sum(ends <= s[:, None], axis=-1)
  live = b < B
  clipped = jnp.minimum(b, B - 1)
  done = (s - (ends - blocks)[clipped]) * rows  # tokens in earlier blocks
  return _Segments(
    sequence=b,
    start=starts[clipped] + done,
    count=jnp.where(live, jnp.clip(counts[clipped] - done, 0, rows), 0),
    end=starts[clipped + 1],
  )


def _tiling(inputs: Inputs, rows: int, segments: int) -> tuple[int, int]:
  """Returns (pages a tile, lanes): enough work an iteration, caches permitting.

  On a CPU an iteration's keys stay in the caches: 768 KiB for a single
  sequence, whose full table is cut evenly; 2 MiB for several, which then take
  fewer iterations; one prefill tile keeps the cores busy. On a GPU an iteration
  costs some ten launches, so many lanes.
  """
  one_row, on_cpu = rows == 1, _on_cpu()
  tokens = 256
  if on_cpu:
    lanes = 4 if one_row else 1
  else:
    lanes = 128 if one_row else 32
  if one_row and on_cpu:
    token_bytes = inputs.num_kv_heads * inputs.head_dim
    token_bytes *= inputs.query.dtype.itemsize
    cached = 3 * 2**18 if segments == 1 else 2**21
    tokens = min(max(cached // (lanes * token_bytes), 32), 512)
    tokens = 1 << (tokens.bit_length() - 1)
    if segments == 1:
      most = max(1, tokens // inputs.page_size) * lanes  # pages an iteration
      iterations = -(-inputs.max_pages // most)
      tokens = -(-inputs.max_pages // (iterations * lanes)) * inputs.page_size
  pages = min(max(1, tokens // inputs.page_size), inputs.max_pages)
  return pages, min(lanes, segments * -(-inputs.max_pages // pages))


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def _segments(inputs, segments, rows):
  """Attention of S segments: out [S, rows, N, H], lse [S, rows, N]."""
  S, dtype = segments.sequence.shape[0], inputs.accumulator_dtype
  walk = _Walk(inputs, segments, rows)
  W = walk.lane.size

  def one_tile(i, carry):
    # The next tile's rows travel in the carry: XLA would otherwise fuse their
    # arithmetic into the copy, and repeat it for every element.
    state, tile = carry
    k, v = walk.load(tile)
    logits = walk.logits(tile, k)
    row = walk.lane + tile.segment
    # The lanes of a single segment have the rows in order.
    new = _fold(state if S == 1 else [x[row] for x in state], logits, v)
    if S > 1:
      new = tuple(x.at[row].set(y) for x, y in zip(state, new))
    return new, walk.locate(i + 1)

  shape = (W + S - 1, inputs.num_kv_heads, rows * inputs.group_size)
  state = (
    jnp.full(shape, -jnp.inf, dtype),
    jnp.zeros(shape, dtype),
    jnp.zeros((*shape, inputs.head_dim), dtype),
  )
  carry = (state, walk.locate(0))
  state, _ = lax.fori_loop(0, walk.share, one_tile, carry)
  first_row, last_row = walk.state_rows()
  if W > 1:
    state = _merge_rows(state, first_row, last_row)
  return _finish(inputs, [x[first_row] for x in state], rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
  """Where one tile of each lane lies."""

  segment: Int[Array, "W"]
  position: Int[Array, "W"]  # of its first slot
  k_rows: Int[Array, "W*K*c"]  # of the pool, see _Walk
  v_rows: Int[Array, "W*K*c"]
  # A page's live slots are bounds[0] <= offset < bounds[1].
  bounds: tuple[Int[Array, "W c"], Int[Array, "W c"]]


class _Walk:
  """The list of S segments' tiles, c pages each, as W lanes walk it.

  Rows of segment s see keys low[s] .. high[s] - 1, from page page[s] on, which
  are tiles firsts[s] .. ends[s] - 1 of the list.
  """

  def __init__(self, inputs: Inputs, segments: _Segments, rows: int):
    p, P, S = inputs.page_size, inputs.num_pages, segments.sequence.shape[0]
    c, W = _tiling(inputs, rows, S)
    self.inputs, self.rows, self.pages = inputs, rows, c
    self.sequence = jnp.minimum(segments.sequence, inputs.num_sequences - 1)
    self.query = _query_rows(inputs, segments, rows)
    length = inputs.lengths[self.sequence]
    # Position of the segment's first query, and the keys any of its rows sees.
    self.at = at = length - (segments.end - segments.start)
    low, high = jnp.zeros_like(at), length
    if inputs.causal:
      high = jnp.minimum(high, at + segments.count)
    if inputs.window is not None:
      low = jnp.maximum(low, at - inputs.window + 1)
    self.low, self.high, self.page = low, high, low // p
    some = (segments.count > 0) & (high > low)
    tiles = jnp.where(some, -(-(high - self.page * p) // (c * p)), 0)
    self.ends = jnp.cumsum(tiles)
    self.firsts, self.total = self.ends - tiles, self.ends[-1]
    self.share = (self.total + W - 1) // W  # tiles a lane, or one less
    self.lane = jnp.arange(W)
    # Where each lane's tiles begin.
    self.lane_tiles = jnp.arange(W + 1) * self.total // W
    self.k_table = self.v_table = jnp.clip(inputs.k_table, 0, P - 1)
    if inputs.combined:
      self.v_table = jnp.clip(inputs.v_table, 0, P - 1)
    # One row = one page of one head, contiguous; no layer is sliced out.
    self.k_pool = inputs.k_pages.reshape(-1, p * inputs.head_dim)
    self.v_pool = inputs.v_pages.reshape(-1, p * inputs.head_dim)
    self.element = jnp.arange(p * inputs.head_dim)

  def locate(self, i) -> _Tile:
    """Where the lanes' i-th tiles lie."""
    inputs, p, K = self.inputs, self.inputs.page_size, self.inputs.num_kv_heads
    tile, last_column = self.lane_tiles[:-1] + i, inputs.max_pages - 1
    s = jnp.sum(self.ends <= tile[:, None], axis=-1)
    s = jnp.minimum(s, self.ends.size - 1)
    mine = tile < self.lane_tiles[1:]
    # A lane that is done reads one page again and again.
    first = self.page[s] + (tile - self.firsts[s]) * self.pages
    first = jnp.where(mine, first, last_column)
    columns = first[:, None] + jnp.arange(self.pages)
    stop = jnp.where(mine, self.high[s], 0)
    bounds = (self.low[s][:, None] - columns * p, stop[:, None] - columns * p)
    entry = (self.sequence[s][:, None], jnp.minimum(columns, last_column))
    layer_row = inputs.layer * (inputs.num_pages * K) + jnp.arange(K)[:, None]

    def pool_rows(table):  # unsigned: no negative index to look out for
      rows = layer_row + table[entry][:, None] * K
      return rows.reshape(-1).astype(jnp.uint32)

    k_rows = pool_rows(self.k_table)
    v_rows = pool_rows(self.v_table) if inputs.combined else k_rows
    return _Tile(
      segment=s, position=first * p, k_rows=k_rows, v_rows=v_rows, bounds=bounds
    )

  def load(self, tile):
    """K and V of the lanes' tiles, [W, K, c * p, H], zeros in dead slots."""
    inputs, bounds = self.inputs, tile.bounds
    p, K, H = inputs.page_size, inputs.num_kv_heads, inputs.head_dim
    k = self.k_pool.at[tile.k_rows].get(mode="promise_in_bounds")
    v = self.v_pool.at[tile.v_rows].get(mode="promise_in_bounds")

    def zero_dead(rows):  # a dead slot may hold NaN, and 0 * NaN is NaN
      start, stop = (
        jnp.repeat(x[:, None] * H, K, axis=1).reshape(-1, 1) for x in bounds
      )
      live = (self.element >= start) & (self.element < stop)
      return jnp.where(live, rows, 0)

    dead = jnp.any((bounds[0] > 0) | (bounds[1] < p))
    # Only first and last tiles of a segment, and of lanes that are done, pay.
    kv = lax.cond(
      dead, lambda *kv: tuple(map(zero_dead, kv)), lambda *kv: kv, k, v
    )
    shape = (self.lane.size, K, self.pages * p, H)
    return [x.reshape(shape).astype(self.query.dtype) for x in kv]

  def logits(self, tile, k):
    """Logits of the lanes' tiles, [W, K, rows * G, c * p], -inf if unseen."""
    inputs, query = self.inputs, self.query
    if query.shape[0] == 1:
      query = jnp.broadcast_to(query, (self.lane.size, *query.shape[1:]))
    else:
      query = query[tile.segment]
    logits = inputs.scale * jnp.einsum(
      "wkrh,wksh->wkrs",
      query,
      k,
      precision="highest",
      preferred_element_type=inputs.accumulator_dtype,
    )
    if inputs.soft_cap is not None:
      logits = inputs.soft_cap * jnp.tanh(logits / inputs.soft_cap)
    return jnp.where(self._mask(tile), logits, -jnp.inf)

  def _mask(self, tile):
    """Which keys of its tile a row sees: [W, 1, rows * G, c * p], or 1 row."""
    inputs, bounds = self.inputs, tile.bounds
    offset = jnp.arange(inputs.page_size)
    live = (offset >= bounds[0][..., None]) & (offset < bounds[1][..., None])
    mask = live.reshape(self.lane.size, -1)[:, None]
    if self.rows == 1:  # it sees all that is live
      return mask[:, None]
    position = tile.position[:, None] + jnp.arange(mask.shape[-1])
    # The queries' positions.
    here = self.at[tile.segment][:, None] + jnp.arange(self.rows)
    mask = mask & (here >= 0)[..., None]
    if inputs.causal:
      mask &= position[:, None] <= here[..., None]
    if inputs.window is not None:
      mask &= position[:, None] > here[..., None] - inputs.window
    return jnp.repeat(mask, inputs.group_size, axis=1)[:, None]

  def state_rows(self):
    """The first and the last row of the state that each segment has."""
    W, S = self.lane.size, self.ends.size

    def row_of(tile):  # of each segment's `tile`: its lane + s
      at_lane = ((tile + 1) * W - 1) // jnp.maximum(self.total, 1)
      return jnp.minimum(at_lane, W - 1) + jnp.arange(S)

    first_row = row_of(self.firsts)
    return first_row, row_of(jnp.maximum(self.ends - 1, self.firsts))


def _query_rows(inputs, segments, rows):
  """The segments' queries [S, K, rows * G, H], in the dtype of the products."""
  K, G, H = inputs.num_kv_heads, inputs.group_size, inputs.head_dim
  # CPUs convert anyway; tensor cores take half precision as it is.
  operand = inputs.accumulator_dtype if _on_cpu() else inputs.query.dtype
  token = segments.start[:, None] + jnp.arange(rows)
  token = jnp.minimum(token, inputs.num_tokens - 1)
  query = inputs.query[token].astype(operand)
  query = query.reshape(-1, rows, K, G, H).transpose(0, 2, 1, 3, 4)
  return query.reshape(-1, K, rows * G, H)


def _fold(state, logits, v):
  """Folds tiles' logits and values into (m, l, o), one step of the softmax."""
  m, l, o = state
  new_m = jnp.maximum(m, logits.max(axis=-1))
  safe = jnp.where(jnp.isneginf(new_m), 0, new_m)
  weights = jnp.exp(logits - safe[..., None])
  decay = jnp.exp(m - safe)
  l = l * decay + weights.sum(axis=-1)
  o = o * decay[..., None] + jnp.einsum(
    "wkrs,wksh->wkrh",
    weights.astype(v.dtype),
    v,
    precision="highest",
    preferred_element_type=o.dtype,
  )
  return new_m, l, o


def _finish(inputs, state, rows):
  """Turns (m, l, o) of S segments into what `_segments` returns."""
  (m, l, o), K, G = state, inputs.num_kv_heads, inputs.group_size
  if inputs.sinks is not None:
    sink = jnp.tile(inputs.sinks.reshape(K, G), (1, rows))
    new_m = jnp.maximum(m, sink)
    safe = jnp.where(jnp.isneginf(new_m), 0, new_m)
    decay = jnp.exp(m - safe)
    l = l * decay + jnp.exp(sink - safe)
    o, m = o * decay[..., None], new_m
  out = o / jnp.where(l == 0, 1, l)[..., None]
  lse = jnp.where(jnp.isneginf(m), 0, m) + jnp.log(l)
  out = out.astype(inputs.query.dtype).reshape(-1, K, rows, G, inputs.head_dim)
  out = out.transpose(0, 2, 1, 3, 4).reshape(-1, rows, K * G, inputs.head_dim)
  lse = lse.reshape(-1, K, rows, G).transpose(0, 2, 1, 3)
  return out, lse.reshape(-1, rows, K * G)


def _merge_rows(state, first_row, last_row):
  """Folds rows first..last of each segment into row first, pair by pair."""
  R = state[0].shape[0]
  r = jnp.arange(R)
  owner = jnp.sum(first_row <= r[:, None], axis=-1) - 1
  last = last_row[jnp.maximum(owner, 0)]

  def one_level(carry):
    step, (m, l, o) = carry
    other = jnp.minimum(r + step, R - 1)
    same = (r + step <= last)[:, None, None]
    other_m = jnp.where(same, m[other], -jnp.inf)
    new_m = jnp.maximum(m, other_m)
    safe = jnp.where(jnp.isneginf(new_m), 0, new_m)
    mine, theirs = jnp.exp(m - safe), jnp.exp(other_m - safe)
    l = l * mine + l[other] * theirs
    o = o * mine[..., None] + o[other] * theirs[..., None]
    return 2 * step, (new_m, l, o)

  most = jnp.max(last_row - first_row) + 1  # rows of the most divided segment
  _, state = lax.while_loop(
    lambda carry: carry[0] < most, one_level, (jnp.int32(1), state)
  )
  return state
