"""What the Triton kernels share: the work list and the online softmax.

Work list. Each row b of a ragged batch is cut into `counts[b]` pieces, and
program w takes the w-th piece of the concatenated list. A program finds its
own by a cumulative sum over the rows, so a plan costs no launch and shapes
stay static: programs beyond the list's end stop at once.

    counts   2  0  3           program    0  1  2  3  4  5 (none)
                               row        0  0  2  2  2
                               piece      0  1  0  1  2

Rows. The query tokens of a sequence times the G query heads of one kv head
form rows r = token * G + g: all of them see the same K and V, so a tile of
rows may cut anywhere. Online softmax, logits in units of log2, keys in tiles:

    m' = max(m, max(s)); l' = l 2^(m - m') + sum(2^(s - m'))
    acc' = acc 2^(m - m') + 2^(s - m') v

A dead slot is never loaded: its K and V are zeros, its logit -inf.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops import backend
from paged_jax.ops.inputs import Inputs

LOG2E = math.log2(math.e)
LN2 = math.log(2)

# acc [rows, padded head dim], running max in log2 [rows], denominator [rows].
Softmax = tuple[Float[Array, "R H"], Float[Array, "R"], Float[Array, "R"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Static facts of a call and the tile sizes chosen for it."""

  num_tokens: int  # T
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  num_pages: int  # P
  page_size: int  # p
  num_sequences: int  # B
  max_pages: int  # M
  scale: float
  causal: bool
  window: int | None
  soft_cap: float | None
  combined: bool  # whether V has a table of its own
  decode: bool  # one token a sequence: there are no query_starts
  interpret: bool
  block_rows: int  # rows a tile, a power of two
  block_kv: int  # keys a tile, a power of two

  @property
  def group_size(self) -> int:  # G
    return self.num_heads // self.num_kv_heads

  @property
  def padded_head_dim(self) -> int:
    return padded(self.head_dim)

  @property
  def capacity(self) -> int:  # tokens a table row can hold
    return self.max_pages * self.page_size


def make_tiles(
  inputs: Inputs, interpret: bool, block_rows: int, block_kv: int
) -> Tiles:
  return Tiles(
    num_tokens=inputs.num_tokens,
    num_heads=inputs.num_heads,
    num_kv_heads=inputs.num_kv_heads,
    head_dim=inputs.head_dim,
    num_pages=inputs.num_pages,
    page_size=inputs.page_size,
    num_sequences=inputs.num_sequences,
    max_pages=inputs.max_pages,
    scale=inputs.scale,
    causal=inputs.causal,
    window=inputs.window,
    soft_cap=inputs.soft_cap,
    combined=inputs.combined,
    decode=inputs.decode,
    interpret=interpret,
    block_rows=block_rows,
    block_kv=block_kv,
  )


def padded(size: int, least: int = 16) -> int:
  """The next power of two, at least the 16 that a matrix product takes."""
  return max(least, 1 << (size - 1).bit_length())


def cdiv(a: Any, b: Any) -> Any:
  """Rounded-up quotient of non-negative integers."""
  return lax.div(a + (b - 1), jnp.int32(b))


def find(
  counts: Int[Array, "B"], w: Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """Returns (row, piece) of entry w of the list, (B, _) beyond its end."""
  done = jnp.cumsum(counts) <= w
  row = jnp.sum(done.astype(jnp.int32))
  return row, w - jnp.sum(jnp.where(done, counts, 0))


def at_positions(
  tiles: Tiles, rows: Int[Array, "R"], length: Any, query_length: Any
) -> Int[Array, "R"]:
  """Returns each row's own position in its sequence."""
  token = lax.div(rows, jnp.int32(tiles.group_size))
  return length - query_length + token


def query_index(
  tiles: Tiles, rows: Int[Array, "R"], valid: Any, start: Any, kv_head: Any
) -> tuple[Int[Array, "R"], Int[Array, "R"]]:
  """Returns (token, query head) of each row, out of bounds where not valid."""
  G = jnp.int32(tiles.group_size)
  token = jnp.where(valid, start + lax.div(rows, G), tiles.num_tokens)
  return token, kv_head * G + lax.rem(rows, G)


def load_rows(
  tiles: Tiles, ref: Any, index: tuple[Any, ...], valid: Any
) -> Float[Array, "R H"]:
  """Loads [rows, padded head dim] of ref[*index, :], zeros where not valid."""
  cols = jnp.arange(tiles.padded_head_dim, dtype=jnp.int32)[None]
  index = tuple(x[:, None] if x.ndim else x for x in index)
  mask = cols < tiles.head_dim
  if valid is not None:
    mask = mask & valid[:, None]
  elif tiles.padded_head_dim == tiles.head_dim:
    mask = None
  return backend.load(ref.at[*index, cols], mask)


def store_rows(
  tiles: Tiles, ref: Any, index: tuple[Any, ...], value: Any, valid: Any
) -> None:
  """Stores [rows, padded head dim] to ref[*index, :] where valid."""
  cols = jnp.arange(tiles.padded_head_dim, dtype=jnp.int32)[None]
  index = tuple(x[:, None] if x.ndim else x for x in index)
  mask = (cols < tiles.head_dim) & valid[:, None]
  backend.store(ref.at[*index, cols], value, mask)


def empty(tiles: Tiles) -> Softmax:
  rows = tiles.block_rows
  return (
    jnp.zeros((rows, tiles.padded_head_dim), jnp.float32),
    jnp.full((rows,), -jnp.inf, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )


def attend(
  tiles: Tiles,
  pools: Any,
  row: Int[Array, ""],
  kv_head: Int[Array, ""],
  query: Float[Array, "R H"],
  at: Int[Array, "R"],
  seen: tuple[Any, Any],
  run: tuple[Any, Any],
  carry: Softmax,
  *,
  masked: bool,
) -> Softmax:
  """Takes the KV tiles run[0]..run[1]-1 of table row `row` into `carry`.

  Args:
    tiles: sizes.
    pools: refs (K rows, V rows, k_table, v_table, layer).
    row: row of the page tables.
    kv_head: kv head.
    query: query rows.
    at: position of each query row.
    seen: positions seen[0]..seen[1]-1 are live and seen by some row; nothing
      else is read.
    run: first and last + 1 KV tile, in units of block_kv positions.
    carry: the online softmax so far.
    masked: False promises that every row sees every key of these tiles.
  """
  k_rows, v_rows, k_table, v_table, layer_ref = pools
  layer, p = layer_ref[0], jnp.int32(tiles.page_size)
  one_page = tiles.page_size % tiles.block_kv == 0

  def load_tile(ref, table, column, offset, live):
    """The tokens at `offset` of the pages that `column` of the table names."""
    page = backend.load(table.at[row, column], None if one_page else live)
    page = layer * tiles.num_pages + jnp.clip(page, 0, tiles.num_pages - 1)
    token = (page * tiles.num_kv_heads + kv_head) * p + offset
    return load_rows(tiles, ref, (token,), live)

  def body(i, carry):
    acc, m, l = carry
    first = i * tiles.block_kv
    positions = first + jnp.arange(tiles.block_kv, dtype=jnp.int32)
    live = None
    if masked:
      live = (positions >= seen[0]) & (positions < seen[1])
    column = lax.div(first if one_page else positions, p)
    offset = positions - column * p
    k = load_tile(k_rows, k_table, column, offset, live)
    s = backend.dot(query, k, transpose_b=True)
    if tiles.soft_cap is None:
      s = s * (tiles.scale * LOG2E)
    else:
      s = jnp.tanh(s * (tiles.scale / tiles.soft_cap))
      s = s * (tiles.soft_cap * LOG2E)
    if masked:
      visible = jnp.broadcast_to(live[None], s.shape)
      if tiles.causal:
        visible &= positions[None] <= at[:, None]
      if tiles.window is not None:
        visible &= positions[None] > at[:, None] - tiles.window
      s = jnp.where(visible, s, -jnp.inf)
    top = jnp.maximum(m, jnp.max(s, axis=1))
    base = jnp.where(top == -jnp.inf, 0.0, top) if masked else top
    decay = backend.exp2(m - base, tiles.interpret)
    weights = backend.exp2(s - base[:, None], tiles.interpret)
    l = l * decay + jnp.sum(weights, axis=1)
    table = v_table if tiles.combined else k_table
    v = load_tile(v_rows, table, column, offset, live)
    acc = acc * decay[:, None] + backend.dot(weights.astype(v.dtype), v)
    return acc, top, l

  return lax.fori_loop(run[0], run[1], body, carry)


def finish(
  carry: Softmax, sink: Float[Array, "R"] | None = None
) -> tuple[Float[Array, "R H"], Float[Array, "R"]]:
  """Returns (out, natural-log LSE); sinks join the denominator alone."""
  acc, m, l = carry
  base = m
  if sink is not None:
    base = jnp.maximum(m, sink * LOG2E)
  base = jnp.where(base == -jnp.inf, 0.0, base)
  decay = jnp.exp2(m - base)
  l = l * decay
  if sink is not None:
    l = l + jnp.exp2(sink * LOG2E - base)
  out = acc * (decay / jnp.where(l == 0, 1.0, l))[:, None]
  return out, base * LN2 + jnp.log(l)


def operands(inputs: Inputs) -> tuple[jax.Array, ...]:
  """The arrays every kernel takes, in the order of its first refs.

  Pools become rows [L*P*K*p, H], so that a token's address is one product.
  Decode gets no query_starts: the iota they are would be a kernel of its own.
  """
  num_rows = math.prod(inputs.k_pages.shape[:-1])
  if num_rows >= 2**31:
    raise NotImplementedError(
      f"k_pages holds {num_rows} rows of H: row ids are int32; use fewer "
      "pages or layers a pool"
    )
  flat = (
    inputs.query,
    inputs.k_pages.reshape(num_rows, inputs.head_dim),
    inputs.v_pages.reshape(num_rows, inputs.head_dim),
    inputs.k_table,
    inputs.v_table,
    inputs.layer.reshape(1),
    inputs.lengths,
  )
  return flat if inputs.decode else (*flat, inputs.query_starts)


def load_starts(
  tiles: Tiles, starts_ref: Any | None, b: Any, mask: Any = None
) -> Any:
  """Returns query_starts[b] of a row or a vector of rows."""
  if starts_ref is None:
    return b
  return backend.load(starts_ref.at[b], mask)
