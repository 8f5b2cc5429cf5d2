"""The computing warpgroups of the Hopper decode kernel: online softmax.

For each tile of a segment, in units of log2:

    s = q k^T * scale         masked to -inf where a row does not see a column
    m' = max(m, max s)        p = 2^(s - m'),  a = 2^(m - m')
    l' = a l + sum p          acc' = a acc + p v

(hopper_scores.py). s and acc live in registers in the layout of WGMMA's
results: 64 rows, 16 a warp. Where there are 32 query rows or fewer, they are
spread over the warps, 8 each, and of s only these are looked at, half of the
registers. The result, acc / l and m + log2 l, is written from there; a sink
joins l before. What is not all of a segment goes to memory as it is, or is
waited for there (hopper_merge.py).
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
  hopper_scores,
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

    *_, split, _ = walk(begin, self._stretch, ahead=ahead)
    return split

  def _stretch(self, at, before):
    """Computes a stretch; `before`: the state of earlier ones, if c.folds."""
    c, barriers = self.config, self.barriers
    low = at.sequence[hopper_plan.LOW]
    high = jnp.minimum(at.sequence[hopper_plan.HIGH], at.end)
    q_slot = lax.rem(at.n, jnp.int32(c.query_slots))
    mosaic.barrier_wait(barriers.q_full.at[q_slot])
    one = functools.partial(self._tile, at, q_slot, low, high)
    start = hopper_scores.start(c.warpgroup_rows, self.inputs.head_dim)
    acc, m, l = lax.fori_loop(0, at.tiles, one, start)
    if c.packed:
      acc = backend.packed(acc, self.interpret)
    state = hopper_state.State(acc, m, l.sum(axis=1))
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
    """The state of rows that have seen nothing: [rows, H], [rows], [rows]."""
    rows = self.config.warpgroup_rows
    return hopper_state.State(
      _full((rows, self.inputs.head_dim), 0.0),
      _full((rows,), -jnp.inf),
      _full((rows,), 0.0),
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
    if c.packed:
      logits = backend.packed(logits, self.interpret)
    unit = inputs.scale * LOG2E  # logits times this are in units of log2
    if inputs.soft_cap is not None:
      logits = soft_cap(logits, inputs.scale, inputs.soft_cap)
      unit = LOG2E
    place = inputs, c, self.wg, at.segment, at.sequence
    dead = (position < low) | (position + c.tokens > high)
    limits = low - position, high - position
    logits = lax.cond(
      dead | self._some_unseen(at.sequence, position),
      lambda x: jnp.where(_seen(*place, position, *limits), x, -jnp.inf),
      lambda x: x,
      logits,
    )
    if c.kb > 1:
      logits = jnp.where(_own_head(*place), logits, -jnp.inf)
    scores = hopper_scores.score(logits, unit, m, masked=True)
    p = scores.weights(0, c.tile)
    l = l * backend.across(scores.alpha, hopper_scores.PARTS)
    l += hopper_scores.sums(p)
    acc = backend.rescale(acc, scores.alpha, self.interpret)
    p = p.astype(inputs.query.dtype)
    if c.packed:
      p = backend.unpacked(p, self.interpret)
    mosaic.barrier_wait(barriers.v_full.at[slot])
    pl.when(dead)(lambda: self._clean(slot, *limits))
    acc = backend.matmul_add(acc, p, v_smem.at[slot], self.interpret)
    mosaic.barrier_arrive(barriers.v_free.at[slot])
    return acc, scores.m, l

  def _some_unseen(self, sequence, position):
    """Whether some query token does not see all of a live tile."""
    inputs, c = self.inputs, self.config
    if inputs.max_query_length == 1:
      return False
    first = sequence[hopper_plan.HIGH] - sequence[hopper_plan.QUERY_LENGTH]
    # Not causal: tokens before the first position see nothing.
    some = position + c.tokens > first + 1 if inputs.causal else first < 0
    if inputs.window is not None:
      some |= position + inputs.window < sequence[hopper_plan.HIGH]
    return some

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
  row = _iota((c.warpgroup_rows,), 0)
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
  """Which column each row sees, bool [rows, c.tile].

  low and high are limits for all rows; all positions but `position`, that of
  the first column, are relative to it.
  """
  step = c.step
  column = _iota((c.warpgroup_rows, c.tile), 1)
  at = column
  if c.kb > 1:  # columns are [page, head of the bundle, token]
    at = (column >> _log2(c.kb * step)) * step + (column & (step - 1))
  if inputs.max_query_length == 1 or not inputs.causal:
    seen = (at >= low) & (at < high)
  if inputs.max_query_length == 1:
    return seen
  token, _ = _split_rows(inputs, c, wg, s, sequence)
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
  return seen


def _own_head(inputs, c, wg, s, sequence):
  """Which columns each row has a head in common with, bool [rows, c.tile]."""
  _, head = _split_rows(inputs, c, wg, s, sequence)
  kv_head = jnp.zeros_like(head)
  for j in range(1, c.kb):
    kv_head += (head >= j * inputs.group_size).astype(jnp.int32)
  # Columns are [page, head of the bundle, token].
  column = _iota((c.warpgroup_rows, c.tile), 1)
  theirs = (column >> _log2(c.step)) & (c.kb - 1)
  return theirs == backend.across(kv_head, c.tile)


def soft_cap(logits, scale, cap):
  """cap * tanh(x / cap), x = logits * scale, to float32 rounding of cap."""
  t = jnp.exp2(logits * (2.0 * LOG2E * scale / cap))
  return cap - (2.0 * cap) / (t + 1.0)


def _full(shape, value):
  x = jnp.full(shape, value, jnp.float32)
  return mosaic.layout_cast(x, _layout(shape))


def _iota(shape, axis):
  return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=_layout(shape))


def _layout(shape):
  """Layout of rows, [rows, n], or of numbers of theirs, [rows]."""
  layout = backend.in_registers(shape[0])
  return layout if len(shape) == 2 else layout.reduce(1)


def _log2(x):
  return x.bit_length() - 1
