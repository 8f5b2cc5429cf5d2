"""Decode in Triton: the KV of every sequence split evenly over the chip.

Few query tokens against many keys is a race for memory bandwidth, and one
sequence has too few heads to fill a GPU. So each sequence's KV tiles are cut
into chunks of about equal size for the whole batch,

    tiles a chunk = ceil(all tiles * K / programs)

    row 0   [ chunk 0 ][ chunk 1 ][ chunk 2 ]      a long sequence: many chunks
    row 1   [ chunk 3 ]                            a short one: one
    row 2   (empty: none)

and program (head, w) attends the G query heads of a kv head, times up to
max_query_length tokens, to chunk w: output and LSE in float32. A row's
partials are contiguous; a second kernel merges them by their LSE:

    out = sum_i exp(lse_i - lse) out_i
    lse = log(sum_i exp(lse_i) + exp(sink))
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import backend
from paged_jax.ops import triton_tiles as tl
from paged_jax.ops.inputs import Inputs

_MERGE_BLOCK = 16  # partials merged at a time


def attend(
  inputs: Inputs, *, interpret: bool
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token."""
  tiles, num_warps, num_stages, programs = _choose(inputs, interpret)
  T, N, K, H, B = (
    tiles.num_tokens,
    tiles.num_heads,
    tiles.num_kv_heads,
    tiles.head_dim,
    tiles.num_sequences,
  )
  num_rows = tiles.group_size * inputs.max_query_length
  row_tiles = -(-num_rows // tiles.block_rows)
  per_head = max(1, programs // (K * row_tiles))
  # Rounding up costs at most one chunk a row.
  num_chunks = min(
    B + per_head, B * -(-tiles.capacity // tiles.block_kv)
  )

  def kernel(*refs):
    _kernel(tiles, row_tiles, per_head, *refs)

  operands = tl.operands(inputs)
  parts, part_lse = backend.triton_call(
    kernel,
    name="paged_decode",
    grid=(K * row_tiles, num_chunks),
    out_shape=(
      jax.ShapeDtypeStruct((num_chunks, K, num_rows, H), jnp.float32),
      jax.ShapeDtypeStruct((num_chunks, K, num_rows), jnp.float32),
    ),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
  )(*operands)

  def merge(*refs):
    _merge(tiles, per_head, *refs)

  sinks = () if inputs.sinks is None else (inputs.sinks,)
  return backend.triton_call(
    merge,
    name="paged_decode_merge",
    grid=(N, T),
    out_shape=(
      jax.ShapeDtypeStruct((T, N, H), inputs.query.dtype),
      jax.ShapeDtypeStruct((T, N), jnp.float32),
    ),
    # Thousands of small programs: barriers cost more than warps give.
    num_warps=max(tiles.padded_head_dim // 64, 1),
    num_stages=1,
    interpret=interpret,
  )(parts, part_lse, *operands[6:], *sinks)


def _choose(inputs, interpret):
  """Returns (tiles, num_warps, num_stages, programs)."""
  rows = inputs.group_size * inputs.max_query_length
  block_rows = min(tl.padded(rows), 64)
  if interpret:  # small tiles, so that small problems have several
    return tl.make_tiles(inputs, interpret, block_rows, 32), 4, 2, 12
  # Measured on an H100 (132 SMs): K and V tiles of 32 KiB, of 8 KiB at H = 64.
  # One sequence is fastest with two programs an SM, many ragged ones with 5 to
  # 8: they balance the load, and beyond that merging costs more.
  row_bytes = tl.padded(inputs.head_dim) * inputs.query.dtype.itemsize
  narrow = row_bytes <= 128
  tile_bytes = 8192 if narrow else 32768
  # Float32 has no tensor cores and lacks registers, older GPUs shared memory.
  if inputs.query.dtype.itemsize == 4 or backend.compute_capability() < 9:
    tile_bytes = 16384
  block_kv = max(tile_bytes // row_bytes, 16)
  tiles = tl.make_tiles(inputs, interpret, block_rows, min(block_kv, 128))
  programs = 4 * inputs.num_sequences * inputs.num_kv_heads
  programs = min(max(264, programs), 660 if narrow else 1056)
  return tiles, 4, 4 if narrow else 3, programs


def _row_tiles(tiles, length, query_length):
  """Returns (first KV tile, KV tiles) of a row, or of a vector of rows."""
  length = jnp.minimum(length, tiles.capacity)
  end = tl.cdiv(length, tiles.block_kv)
  first = jnp.zeros_like(end)
  if tiles.window is not None:
    low = length - query_length - tiles.window + 1
    first = lax.div(jnp.maximum(low, 0), jnp.int32(tiles.block_kv))
  return first, jnp.where(query_length > 0, end - first, 0)


def _chunk_counts(tiles, per_head, lengths_ref, starts_ref):
  """Returns the chunks of each row, [B] padded."""
  b = jnp.arange(tl.padded(tiles.num_sequences), dtype=jnp.int32)
  inside = b < tiles.num_sequences
  length = backend.load(lengths_ref.at[b], inside)
  start, end = (
    tl.load_starts(tiles, starts_ref, i, inside) for i in (b, b + 1)
  )
  _, count = _row_tiles(tiles, length, jnp.where(inside, end - start, 0))
  chunk = jnp.maximum(tl.cdiv(jnp.sum(count), per_head), 1)
  return lax.div(count + chunk - 1, jnp.broadcast_to(chunk, count.shape))


def _kernel(tiles, row_tiles, per_head, query_ref, k_ref, v_ref, k_table,
            v_table, layer_ref, lengths_ref, *rest):
  *starts_ref, out_ref, lse_ref = rest
  starts_ref = None if tiles.decode else starts_ref[0]
  B, G = tiles.num_sequences, tiles.group_size
  counts = _chunk_counts(tiles, per_head, lengths_ref, starts_ref)
  chunk = pl.program_id(1)
  b, piece = tl.find(counts, chunk)
  kv_head = lax.div(pl.program_id(0), jnp.int32(row_tiles))
  first_row = lax.rem(pl.program_id(0), jnp.int32(row_tiles)) * tiles.block_rows

  @pl.when(b < B)
  def _():
    start = tl.load_starts(tiles, starts_ref, b)
    query_length = tl.load_starts(tiles, starts_ref, b + 1) - start
    length = jnp.minimum(lengths_ref[b], tiles.capacity)
    first_tile, num_tiles = _row_tiles(tiles, length, query_length)
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)
    pieces = jnp.sum(jnp.where(index == b, counts, 0))
    run = tuple(
      first_tile + lax.div(num_tiles * i, pieces) for i in (piece, piece + 1)
    )
    rows = first_row + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    valid = rows < query_length * G

    @pl.when(first_row < query_length * G)
    def _():
      token, head = tl.query_index(tiles, rows, valid, start, kv_head)
      at = tl.at_positions(tiles, rows, length, query_length)
      low = jnp.int32(0)
      if tiles.window is not None:
        low = jnp.maximum(length - query_length - tiles.window + 1, 0)
      pools = (k_ref, v_ref, k_table, v_table, layer_ref)
      query = tl.load_rows(tiles, query_ref, (token, head), valid)
      acc, m, l = tl.attend(
        tiles, pools, b, kv_head, query, at, (low, length), run,
        tl.empty(tiles), masked=True,
      )
      some = at >= 0
      m, l = jnp.where(some, m, -jnp.inf), jnp.where(some, l, 0.0)
      out, lse = tl.finish((acc, m, l))
      row = jnp.where(valid, rows, out_ref.shape[2])
      tl.store_rows(tiles, out_ref, (chunk, kv_head, row), out, valid)
      backend.store(lse_ref.at[chunk, kv_head, row], lse, valid)


def _merge(tiles, per_head, parts_ref, part_lse_ref, lengths_ref, *rest):
  *rest, out_ref, lse_ref = rest
  starts_ref = None if tiles.decode else rest[0]
  sinks = rest if tiles.decode else rest[1:]
  B, G = tiles.num_sequences, tiles.group_size
  head, token = pl.program_id(0), pl.program_id(1)
  counts = _chunk_counts(tiles, per_head, lengths_ref, starts_ref)
  index = jnp.arange(counts.shape[0], dtype=jnp.int32)
  # The token's row is behind all rows that end at or before it.
  end = tl.load_starts(tiles, starts_ref, index + 1, index < B)
  b = jnp.sum(((index < B) & (end <= token)).astype(jnp.int32))
  first = jnp.sum(jnp.where(index < b, counts, 0))
  pieces = jnp.sum(jnp.where(index == b, counts, 0))
  kv_head = lax.div(head, jnp.int32(G))
  start = tl.load_starts(tiles, starts_ref, b)
  row = (token - start) * G + lax.rem(head, jnp.int32(G))
  cols = jnp.arange(tiles.padded_head_dim, dtype=jnp.int32)

  def body(i, carry):
    acc, m, l = carry
    piece = i * _MERGE_BLOCK + jnp.arange(_MERGE_BLOCK, dtype=jnp.int32)
    live = piece < pieces
    part = first + piece
    lse = backend.load(
      part_lse_ref.at[part, kv_head, row], live, -jnp.inf
    )
    out = tl.load_rows(tiles, parts_ref, (part, kv_head, row), live)
    top = jnp.maximum(m, jnp.max(lse))
    base = jnp.where(top == -jnp.inf, 0.0, top)
    decay = jnp.exp(m - base)
    weights = jnp.exp(lse - base)
    acc = acc * decay + jnp.sum(out * weights[:, None], axis=0)
    return acc, top, l * decay + jnp.sum(weights)

  acc, m, l = lax.fori_loop(
    0,
    tl.cdiv(pieces, _MERGE_BLOCK),
    body,
    (jnp.zeros(cols.shape, jnp.float32), jnp.float32(-jnp.inf),
     jnp.float32(0)),
  )
  base = m
  if sinks:
    sink = jnp.where(b < B, sinks[0][head], -jnp.inf)
    base = jnp.maximum(m, sink)
  base = jnp.where(base == -jnp.inf, 0.0, base)
  decay = jnp.exp(m - base)
  l = l * decay
  if sinks:
    l = l + jnp.exp(sink - base)
  out = acc * (decay / jnp.where(l == 0, 1.0, l))
  backend.store(out_ref.at[token, head, cols], out, cols < tiles.head_dim)
  lse_ref[token, head] = base + jnp.log(l)
