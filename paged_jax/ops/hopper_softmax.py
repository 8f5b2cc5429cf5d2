"""The computing warpgroups of the Hopper decode kernel: online softmax.

For each tile of a segment, in units of log2:

    s = q k^T * scale         masked to -inf where a row does not see a column
    m' = max(m, max s)        p = 2^(s - m'),  a = 2^(m - m')
    l' = a l + sum p          acc' = a acc + p v

s and acc live in registers in the layout of WGMMA's results: 64 rows, 16 a
warp. The result is acc / l and m + log2 l, written through shared memory; a
sink joins l where this is the output.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_fetch, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic

_LOG2E = math.log2(math.e)


class _Barriers(NamedTuple):
  """By slot, whether it is full or free; V's dead rows."""

  q_full: Any
  q_free: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any
  v_clean: Any


def attend(
  inputs,
  c,
  walk,
  interpret,
  wg,
  sinks_ref,
  outputs,
  shares,
  buffers,
  staging,
  barriers,
):
  """Online softmax over the tiles of each stretch."""
  warpgroup = _Warpgroup(
    inputs=inputs,
    config=c,
    interpret=interpret,
    wg=wg,
    sinks=sinks_ref,
    outputs=outputs,
    shares=shares,
    buffers=buffers,
    staging=staging,
    barriers=_Barriers(*barriers),
  )
  # The accumulator of H = 256 leaves no registers to read ahead, nor does a
  # third warpgroup.
  ahead = inputs.head_dim < 256 and c.consumers == 1
  walk(lambda *_: (), warpgroup.stretch, ahead=ahead)
  if shares:
    mosaic.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Warpgroup:
  """What a computing warpgroup knows and works with."""

  inputs: Any
  config: hopper_tuning.Config
  interpret: bool
  wg: Any
  sinks: Any
  outputs: tuple[Any, Any]  # of whole segments: results and their LSE
  shares: tuple[Any, ...]  # likewise of others
  buffers: tuple[Any, Any, Any]  # shared memory of query, K, V, by slot
  staging: tuple[Any, ...]  # likewise of shares
  barriers: _Barriers

  def stretch(self, at, _):
    """Computes a stretch and writes the result."""
    c, barriers = self.config, self.barriers
    low = at.sequence[hopper_plan.LOW]
    high = jnp.minimum(at.sequence[hopper_plan.HIGH], at.end)
    q_slot = lax.rem(at.n, jnp.int32(c.query_slots))
    mosaic.barrier_wait(barriers.q_full.at[q_slot])
    one = functools.partial(self._tile, at, q_slot, low, high)
    state = lax.fori_loop(0, at.tiles, one, self._start())
    mosaic.barrier_arrive(barriers.q_free.at[q_slot])

    def share():
      out, lse = _normalise(*state)
      _write_share(c, at.partial, self.wg, out, lse, self.shares, self.staging)

    if c.cut == hopper_tuning.WHOLE:
      self._write_whole(at, state)
    else:
      pl.when(at.whole)(lambda: self._write_whole(at, state))
      pl.when(jnp.logical_not(at.whole))(share)
    return ()

  def _start(self):
    """The state of rows that have seen nothing: [64, H], [64], [64]."""

    def full(shape, value, layout):
      return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    by_row = mosaic.Layout.WGMMA.reduce(1)
    return (
      full((64, self.inputs.head_dim), 0.0, mosaic.Layout.WGMMA),
      full((64,), -jnp.inf, by_row),
      full((64,), 0.0, by_row),
    )

  def _tile(self, at, q_slot, low, high, i, carry):
    """Online softmax over the stretch's i-th tile."""
    acc, m, l = carry
    inputs, c, barriers = self.inputs, self.config, self.barriers
    q_smem, k_smem, v_smem = self.buffers
    position = at.begin + i * c.tokens
    slot = lax.rem(at.done + i, jnp.int32(c.stages))
    mosaic.barrier_wait(barriers.k_full.at[slot])
    logits = backend.matmul(
      q_smem.at[q_slot], k_smem.at[slot], (64, c.tile), self.interpret
    )
    mosaic.barrier_arrive(barriers.k_free.at[slot])
    unit = inputs.scale * _LOG2E  # logits times this are in units of log2
    if inputs.soft_cap is not None:
      logits = soft_cap(logits, inputs.scale, inputs.soft_cap)
      unit = _LOG2E
    place = inputs, c, self.wg, at.segment, at.sequence
    seen = _seen(*place, position, low - position, high - position)
    logits = jnp.where(seen, logits, -jnp.inf)
    m_new = jnp.maximum(m, logits.max(axis=1) * unit)
    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    alpha = jnp.exp2(m - m_safe)
    p = jnp.exp2(logits * unit - backend.across(m_safe, c.tile))
    l = l * alpha + p.sum(axis=1)
    acc = acc * backend.across(alpha, inputs.head_dim)
    p = p.astype(inputs.query.dtype)
    mosaic.barrier_wait(barriers.v_full.at[slot])
    dead = (position < low) | (position + c.tokens > high)
    pl.when(dead)(lambda: self._clean(slot, low - position, high - position))
    acc = backend.matmul_add(acc, p, v_smem.at[slot], self.interpret)
    mosaic.barrier_arrive(barriers.v_free.at[slot])
    return acc, m_new, l

  def _clean(self, slot, low, high):
    """Zeroes the rows of V outside positions low .. high - 1 of its tile."""
    c = self.config
    *_, v_smem = self.buffers

    @pl.when(self.wg == 0)  # the tile is shared
    def _():
      backend.zero_dead_rows(
        v_smem.at[slot], low, high, self.interpret, heads=c.kb, step=c.step
      )

    if c.consumers > 1:
      mosaic.barrier_arrive(self.barriers.v_clean)
      mosaic.barrier_wait(self.barriers.v_clean)

  def _write_whole(self, at, state):
    """Writes the output of a segment that this CTA computed as a whole."""
    place = self.inputs, self.config, self.wg, at.segment, at.sequence
    if self.sinks is not None:
      state = _add_sinks(*place, self.sinks, *state)
    out, lse = _normalise(*state)
    _write_output(
      *place, self.interpret, out, lse * (1 / _LOG2E), self.outputs
    )


def _normalise(acc, m, l):
  """Returns acc / l and the log2-sum-exp, 0 and -inf where nothing was seen."""
  out = acc * backend.across(1.0 / jnp.where(l == 0.0, 1.0, l), acc.shape[1])
  return out, jnp.where(l == 0.0, -jnp.inf, m + jnp.log2(l))


def _add_sinks(inputs, c, wg, s, sequence, sinks_ref, acc, m, l):
  """Adds each head's sink to its rows' denominators, as a logit without V."""
  _, head = _split_rows(inputs, c, wg, s, sequence)
  first = lax.div(s, jnp.int32(c.row_blocks)) * c.heads
  sink = jnp.zeros_like(m)
  for h in range(c.heads):
    sink = jnp.where(head == h, sinks_ref[first + h] * _LOG2E, sink)
  top = jnp.maximum(m, sink)
  safe = jnp.where(top == -jnp.inf, 0.0, top)
  alpha = jnp.exp2(m - safe)
  l = l * alpha + jnp.exp2(sink - safe)
  return acc * backend.across(alpha, acc.shape[1]), top, l


def _split_rows(inputs, c, wg, s, sequence):
  """Which token of the row block, and which of its heads, each row is.

  Rows around a token's own are of heads below 0 or from c.heads on.
  """
  row = _iota((64,), 0, mosaic.Layout.WGMMA.reduce(1))
  if c.consumers > 1:
    row += wg * 64
  token = jnp.zeros_like(row)
  for j in range(1, c.block_tokens):
    token += (row >= j * c.token_rows).astype(jnp.int32)
  head = row - token * c.token_rows
  if c.heads % 8:
    bundle = lax.div(s, jnp.int32(c.row_blocks))
    start = sequence[hopper_plan.QUERY_START]
    start += lax.rem(s, jnp.int32(c.row_blocks)) * c.block_tokens
    for j in range(c.block_tokens):
      first = hopper_fetch.query_row(inputs, c, start + j, bundle)
      shift = hopper_fetch.row_shift(c, first)
      head -= shift if c.block_tokens == 1 else jnp.where(token == j, shift, 0)
  return token, head


def _seen(inputs, c, wg, s, sequence, position, low, high):
  """Which column each row sees, bool [64, part].

  low and high are limits for all rows; all positions but `position`, that of
  the first column, are relative to it.
  """
  shape, G, step = (64, c.tile), inputs.group_size, c.step
  column = _iota(shape, 1, mosaic.Layout.WGMMA)
  at = column
  if c.kb > 1:  # columns are [page, head of the bundle, token]
    at = (column >> _log2(c.kb * step)) * step + (column & (step - 1))
  if inputs.max_query_length == 1 or not inputs.causal:
    seen = (at >= low) & (at < high)
  if c.kb == 1 and inputs.max_query_length == 1:
    return seen
  token, head = _split_rows(inputs, c, wg, s, sequence)
  if inputs.max_query_length > 1:
    block = lax.rem(s, jnp.int32(c.row_blocks)) * c.block_tokens
    first = sequence[hopper_plan.HIGH] - sequence[hopper_plan.QUERY_LENGTH]
    own = token + (first + block - position)
    if inputs.causal:
      # Rows past the last token would see beyond the sequence.
      seen = at < backend.across(jnp.minimum(own + 1, high), c.tile)
    else:  # tokens before the first position see nothing
      end = jnp.where(own >= -position, c.tile, 0)
      seen &= at < backend.across(end, c.tile)
    if inputs.window is not None:
      seen &= at > backend.across(own - inputs.window, c.tile)
  if c.kb > 1:
    kv_head = jnp.zeros_like(head)
    for j in range(1, c.kb):
      kv_head += (head >= j * G).astype(jnp.int32)
    theirs = (column >> _log2(step)) & (c.kb - 1)
    seen &= theirs == backend.across(kv_head, c.tile)
  return seen


def _write_output(
  inputs, c, wg, s, sequence, interpret, out, lse, outputs
):
  """Stores the rows of a whole segment, each to its token and head."""
  out_ref, lse_ref = outputs
  token, head = _split_rows(inputs, c, wg, s, sequence)
  bundle = lax.div(s, jnp.int32(c.row_blocks))
  token += lax.rem(s, jnp.int32(c.row_blocks)) * c.block_tokens
  own = (head >= 0) & (head < c.heads)
  own &= token < sequence[hopper_plan.QUERY_LENGTH]
  row = jnp.where(own, sequence[hopper_plan.QUERY_START] + token, -1)
  column = bundle * c.heads + head
  backend.store_rows(lse_ref, lse, row, column, interpret)
  backend.store_rows(
    out_ref, out.astype(out_ref.dtype), row, column * c.width, interpret
  )


def _write_share(c, place, wg, out, lse, shares, staging):
  """Stores a partial result through shared memory, some columns at a time."""
  (o_ref, lse_ref), (o_smem, lse_smem) = shares, staging

  def copy(w, i):  # the rows of consumer w
    source = pl.ds(0, min(c.rows - 64 * w, 64))
    target = pl.ds(64 * w, source.size)
    if i == 0:
      mosaic.copy_smem_to_gmem(lse_smem.at[source], lse_ref.at[place, target])
    column = pl.ds(i * c.columns, c.columns)
    mosaic.copy_smem_to_gmem(o_smem.at[source], o_ref.at[place, target, column])

  for i in range(out.shape[1] // c.columns):
    # What was copied from there before must have been read.
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
    if i == 0:
      lse_smem[...] = lse
    o_smem[...] = out[:, i * c.columns : (i + 1) * c.columns]
    mosaic.commit_smem()
    if c.consumers == 1:
      copy(0, i)
    else:
      for w in range(c.consumers):
        pl.when(wg == w)(functools.partial(copy, w, i))


def soft_cap(logits, scale, cap):
  """cap * tanh(x / cap), x = logits * scale, to float32 rounding of cap."""
  t = jnp.exp2(logits * (2.0 * _LOG2E * scale / cap))
  return cap - (2.0 * cap) / (t + 1.0)


def _iota(shape, axis, layout):
  return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def _log2(x):
  return x.bit_length() - 1
