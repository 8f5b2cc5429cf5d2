"""The computing warpgroups of the Hopper decode kernel: online softmax.

For each tile of a segment, in units of log2:

    s = q k^T * scale         masked to -inf where a row does not see a column
    m' = max(m, max s)        p = 2^(s - m'),  a = 2^(m - m')
    l' = a l + sum p          acc' = a acc + p v

s and acc live in registers in the layout of WGMMA's results: 64 rows, 16 a
warp. The result, acc / l and m + log2 l, is written from there; a sink joins l
before. What is not all of a segment goes to memory as it is, or is waited for
there (hopper_merge.py).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import (
  backend,
  hopper_fetch,
  hopper_merge,
  hopper_plan,
  hopper_state,
  hopper_tuning,
)
from paged_jax.ops.backend import mosaic
from paged_jax.ops.hopper_state import LOG2E


class Barriers(NamedTuple):
  """By slot, whether it is full or free; meetings of computing warpgroups."""

  q_full: Any
  q_free: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any
  meeting: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warpgroup:
  """What a computing warpgroup knows and works with."""

  inputs: Any
  config: hopper_tuning.Config
  interpret: bool
  wg: Any
  sinks: Any
  outputs: tuple[Any, Any]  # results and their LSE
  parts: hopper_merge.Parts | None  # where segments may be split
  buffers: tuple[Any, Any, Any]  # shared memory of query, K, V, by slot
  barriers: Barriers

  def attend(self, walk):
    """Online softmax over the tiles of each stretch; returns the last split."""
    c = self.config
    # The accumulator of H = 256 leaves no registers to read ahead, nor does a
    # third warpgroup.
    ahead = self.inputs.head_dim < 256 and c.consumers == 1

    def begin(*_):
      return self._start() if c.folds else ()

    *_, split = walk(begin, self._stretch, ahead=ahead)
    return split

  def _stretch(self, at, before):
    """Computes a stretch; `before`: the state of earlier ones, if c.folds."""
    c, barriers = self.config, self.barriers
    low = at.sequence[hopper_plan.LOW]
    high = jnp.minimum(at.sequence[hopper_plan.HIGH], at.end)
    q_slot = lax.rem(at.n, jnp.int32(c.query_slots))
    mosaic.barrier_wait(barriers.q_full.at[q_slot])
    one = functools.partial(self._tile, at, q_slot, low, high)
    state = lax.fori_loop(0, at.tiles, one, self._start())
    mosaic.barrier_arrive(barriers.q_free.at[q_slot])
    if c.cut == hopper_tuning.WHOLE:
      self._write_output(at, state)
    elif c.folds:
      state = self._fold(at, before, state)
      pl.when(at.head & at.ended)(lambda: self._write_output(at, state))
      # A later piece takes it along, if there is one.
      pl.when(jnp.logical_not(at.head & (at.ended | at.goes_on)))(
        lambda: self._write_part(at, state)
      )
      return state
    else:
      whole = at.head & at.ended & (at.item == 0)
      pl.when(whole)(lambda: self._write_output(at, state))
      pl.when(jnp.logical_not(whole))(
        lambda: self._write_part(at, hopper_state.settle(state))
      )
      if c.cut == hopper_tuning.FIXED:
        pl.when(at.head & at.ended & (at.item > 0))(lambda: self._merge(at))
    return ()

  def _fold(self, at, before, state):
    """Returns the settled state, with earlier pieces of the segment."""
    state = hopper_state.settle(state)
    later = at.head & (at.item > 0)
    return hopper_state.State(*(
      jnp.where(later, x, y)
      for x, y in zip(hopper_state.join(before, state), state, strict=True)
    ))

  def _write_part(self, at, state):
    """Leaves a part in memory, for another CTA if that has the first one."""
    self.parts.write(self.wg, at.part, state)

    @pl.when(jnp.logical_not(at.head))
    def _():
      self.parts.hand_over(self.wg, at.part)

  def _merge(self, at):
    """Puts together pieces that are all this CTA's."""
    backend.meet(self.barriers.meeting)
    self.parts.merge(at.split, self.wg, self.config.consumers)

  def _start(self):
    """The state of rows that have seen nothing: [64, H], [64], [64]."""

    def full(shape, value, layout):
      return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    by_row = mosaic.Layout.WGMMA.reduce(1)
    return hopper_state.State(
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
    unit = inputs.scale * LOG2E  # logits times this are in units of log2
    if inputs.soft_cap is not None:
      logits = soft_cap(logits, inputs.scale, inputs.soft_cap)
      unit = LOG2E
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
    return hopper_state.State(acc, m_new, l)

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
      backend.meet(self.barriers.meeting)

  def _write_output(self, at, state):
    """Writes the output of a segment, each row to its token and head."""
    inputs, c = self.inputs, self.config
    place = inputs, c, self.wg, at.segment, at.sequence
    token, head = _split_rows(*place)
    bundle = lax.div(at.segment, jnp.int32(c.row_blocks))
    if self.sinks is not None:
      sink = jnp.zeros_like(state.m)
      for h in range(c.heads):
        own = self.sinks[bundle * c.heads + h]
        sink = jnp.where(head == h, own, sink)
      state = hopper_state.add_sink(state, sink)
    out, lse = hopper_state.normalise(state)
    token += lax.rem(at.segment, jnp.int32(c.row_blocks)) * c.block_tokens
    own = (head >= 0) & (head < c.heads)
    own &= token < at.sequence[hopper_plan.QUERY_LENGTH]
    row = jnp.where(own, at.sequence[hopper_plan.QUERY_START] + token, -1)
    column = bundle * c.heads + head
    store = functools.partial(backend.store_rows, interpret=self.interpret)
    out_ref, lse_ref = self.outputs
    store(lse_ref, lse, row, column)
    store(out_ref, out.astype(out_ref.dtype), row, column * inputs.head_dim)


def write_unowned(inputs, sequences_ref, helper, helpers, outputs, interpret):
  """Writes 0, and -inf as LSE, of tokens that no sequence owns.

  helper, helpers: which of all computing warpgroups this is.
  """
  N, H, rows = inputs.num_heads, inputs.head_dim, 8
  used = sum(
    sequences_ref[inputs.num_sequences - 1, i]
    for i in (hopper_plan.QUERY_START, hopper_plan.QUERY_LENGTH)
  )
  out_ref, lse_ref = outputs

  def one(i, _):
    token = used + helper + i * helpers
    for first in range(0, N, rows):
      span = 0, N - first
      zeros = backend.full_strided(rows * H, 0.0, out_ref.dtype)
      backend.store_span(
        out_ref, token, first * H, zeros, *span, H, interpret
      )
      lse = backend.full_numbers(rows * H, -jnp.inf)
      backend.store_numbers(
        lse_ref, token, first, lse, *span, rows, H, interpret
      )

  mine = inputs.num_tokens - used - helper + (helpers - 1)
  lax.fori_loop(0, lax.div(mine, jnp.int32(helpers)), one, None)


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


def soft_cap(logits, scale, cap):
  """cap * tanh(x / cap), x = logits * scale, to float32 rounding of cap."""
  t = jnp.exp2(logits * (2.0 * LOG2E * scale / cap))
  return cap - (2.0 * cap) / (t + 1.0)


def _iota(shape, axis, layout):
  return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def _log2(x):
  return x.bit_length() - 1
