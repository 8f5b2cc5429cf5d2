"""Prefill in Triton: packed ragged queries, one program a tile of rows.

A tile holds `block_rows` rows of one kv head: query tokens times the G query
heads that share its K and V. Program (w, head) finds the sequence and the tile
that entry w of the work list names, loads its queries once, and walks the keys
that its rows see:

    keys     0 ........ full ......... end       full: seen by every row
             | no masks  | causal and length |    end:  seen by the last row

Tiles run from the list's end to its start, so that the longest tiles of a
sequence are launched first. Tokens beyond the last sequence form one more row
of the list, of length 0, which writes their zeros.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import backend
from paged_jax.ops import triton_tiles as tl
from paged_jax.ops.inputs import Inputs


def attend(
  inputs: Inputs, *, interpret: bool
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token."""
  tiles, num_warps, num_stages = _choose(inputs, interpret)
  T, N, K, H = (
    tiles.num_tokens,
    tiles.num_heads,
    tiles.num_kv_heads,
    tiles.head_dim,
  )
  num_tiles = T * tiles.group_size // tiles.block_rows + tiles.num_sequences + 1
  sinks = () if inputs.sinks is None else (inputs.sinks,)

  def kernel(*refs):
    _kernel(tiles, num_tiles, *refs)

  return backend.triton_call(
    kernel,
    name="paged_prefill",
    grid=(num_tiles, K),
    out_shape=(
      jax.ShapeDtypeStruct((T, N, H), inputs.query.dtype),
      jax.ShapeDtypeStruct((T, N), jnp.float32),
    ),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
  )(*tl.operands(inputs), *sinks)


def _choose(inputs, interpret):
  """Returns (tiles, num_warps, num_stages)."""
  if interpret:  # small tiles, so that small problems have several
    return tl.make_tiles(inputs, interpret, 32, 32), 4, 2
  row_bytes = tl.padded(inputs.head_dim) * inputs.query.dtype.itemsize
  if inputs.query.dtype.itemsize == 4:  # no tensor cores: registers are short
    block_kv = 32 if row_bytes <= 512 else 16
    return tl.make_tiles(inputs, interpret, 32, block_kv), 4, 2
  if backend.compute_capability() < 9:  # 99 KiB of shared memory at least
    block_kv = min(16384 // row_bytes, 64)
    return tl.make_tiles(inputs, interpret, 64, block_kv), 4, 2
  block_kv = 128 if row_bytes == 256 else 64
  num_stages = 2 if row_bytes <= 128 else 3
  return tl.make_tiles(inputs, interpret, 128, block_kv), 8, num_stages


def _kernel(tiles, num_tiles, query_ref, k_ref, v_ref, k_table, v_table,
            layer_ref, lengths_ref, starts_ref, *rest):
  *sinks, out_ref, lse_ref = rest
  B, G, T = tiles.num_sequences, tiles.group_size, tiles.num_tokens
  kv_head = pl.program_id(1)
  b, tile = tl.find(
    _tile_counts(tiles, starts_ref), num_tiles - 1 - pl.program_id(0)
  )

  @pl.when(b <= B)
  def _():
    row = jnp.minimum(b, B - 1)
    beyond = b == B  # the tokens after the last sequence
    start = starts_ref[b]
    query_length = jnp.where(beyond, T, starts_ref[row + 1]) - start
    length = jnp.minimum(lengths_ref[row], tiles.capacity)
    length = jnp.where(beyond, 0, length)

    num_rows = query_length * G
    first = tile * tiles.block_rows
    rows = first + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    valid = rows < num_rows
    token, head = tl.query_index(tiles, rows, valid, start, kv_head)
    at = tl.at_positions(tiles, rows, length, query_length)
    last = jnp.minimum(first + tiles.block_rows, num_rows) - 1
    at_first, at_last = (
      length - query_length + lax.div(r, jnp.int32(G)) for r in (first, last)
    )
    low, high, full = jnp.int32(0), length, length
    if tiles.causal:
      high = jnp.clip(at_last + 1, 0, length)
      full = jnp.clip(at_first + 1, 0, length)
    full = lax.div(full, jnp.int32(tiles.block_kv))
    if tiles.window is not None:
      low = jnp.maximum(at_first - tiles.window + 1, 0)
      full = lax.div(low, jnp.int32(tiles.block_kv))
    end = tl.cdiv(high, tiles.block_kv)

    pools = (k_ref, v_ref, k_table, v_table, layer_ref)
    query = tl.load_rows(tiles, query_ref, (token, head), valid)
    carry = tl.empty(tiles)
    state = (tiles, pools, row, kv_head, query, at, (low, high))
    if tiles.window is None:
      carry = tl.attend(*state, (jnp.int32(0), full), carry, masked=False)
    carry = tl.attend(*state, (full, end), carry, masked=True)

    sink = None
    if sinks:
      sink = backend.load(sinks[0].at[head], valid)
      sink = jnp.where(beyond, -jnp.inf, sink)
    acc, m, l = carry
    # A query before position 0 (more queries than keys) sees nothing.
    some = at >= 0
    m, l = jnp.where(some, m, -jnp.inf), jnp.where(some, l, 0.0)
    out, lse = tl.finish((acc, m, l), sink)
    tl.store_rows(tiles, out_ref, (token, head), out, valid)
    backend.store(lse_ref.at[token, head], lse, valid)


def _tile_counts(tiles, starts_ref):
  """Returns the tiles of each sequence, and of the tokens beyond the last."""
  B = tiles.num_sequences
  b = jnp.arange(tl.padded(B + 1), dtype=jnp.int32)
  start = backend.load(starts_ref.at[b], b <= B)
  end = backend.load(starts_ref.at[b + 1], b < B)
  end = jnp.where(b == B, tiles.num_tokens, end)
  rows = jnp.where(b <= B, end - start, 0) * tiles.group_size
  return tl.cdiv(rows, tiles.block_rows)
