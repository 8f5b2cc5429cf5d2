"""The computing warpgroups of the Hopper prefill kernel: online softmax.

For each unit of an item (hopper_prefill_units.py), in base-2 logarithms:

    s = q k^T                   then the turn is passed on; masked to -inf,
                                where some row does not see all
    m' = max s, where that is above m + 8, else m
    p = 2^(s - m'), a = 2^(m - m'),  l' = a l + sum p,  acc = a acc
    take the turn on the tensor cores
    acc += p v

so a turn is p v of one unit and q k^T of the next (where an item begins or
ends, one of the two), while another warpgroup has softmax to do. s and acc live
in registers in the layout of WGMMA's results, 64 rows, 16 a warp.

m follows the maximum with some slack, so that p may reach 2^8: a is 1 after the
first few tiles, where acc is left alone. A row's m depends on no other row. l
is kept in 8 parts: the 4 threads of a row, 2 columns each, do not meet for it.
Where softmax is long beside a turn (heads of 64), p v begins with the first
columns and the weights of the last ones (`late`) are computed meanwhile.

A warpgroup without rows in an item keeps step.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import (
  backend,
  hopper_prefill_store,
  hopper_prefill_units,
  hopper_softmax,
)
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic

_LOG2E = math.log2(math.e)
_PARTS = 8  # of a row's denominator: 4 threads, 2 columns each
_SLACK = 8.0  # see above; 2^8 is far from what float16 overflows at


def attend(inputs, c, items, interpret, wg, outputs, buffers, barriers):
  """Attention of this warpgroup's 64 rows of each item."""
  q_smem, k_smem, v_smem, o_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free, turns, v_clean = barriers
  H, size = inputs.head_dim, c.tile
  dtype = inputs.query.dtype
  to_log2 = inputs.scale * _LOG2E  # makes base-2 logarithms of logits
  by_row = mosaic.Layout.WGMMA.reduce(1)

  def take_turn():
    mosaic.barrier_wait(turns.at[wg])

  def pass_turn():
    mosaic.barrier_arrive(turns.at[lax.rem(wg + 1, jnp.int32(c.consumers))])

  def full(shape, value, layout):
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  def walk_item(item):
    begin, end = item.tile[plan.BEGIN], item.tile[plan.END]
    units = hopper_prefill_units.Units(
      inputs=inputs, config=c, tile=item.tile
    )
    stretches = list(units.stretches())  # not while a turn is held
    q_slot = lax.rem(item.n, jnp.int32(c.query_slots))

    def slot_of(kv_tile):
      return lax.rem(item.done + (kv_tile - begin), jnp.int32(c.stages))

    def clean(kv_tile, tile):
      """Zeroes what is dead of V, each warpgroup its part of the rows."""
      position, length = kv_tile * size, tile[plan.LENGTH]
      low = 0 if inputs.window is None else tile[plan.LOW]
      dead = length - position < size
      if inputs.window is not None:
        dead |= low - position > 0

      @pl.when(dead)
      def _():
        v = v_smem.at[slot_of(kv_tile)]
        low_here, high_here = low - position, length - position
        _zero_dead_rows(c, wg, v, low_here, high_here, interpret)
        mosaic.barrier_arrive(v_clean)
        mosaic.barrier_wait(v_clean)

    def one_unit(i, carry, stretch):
      acc, m, l = carry
      width, masked = stretch.width, stretch.masked
      unit = units.unit(i, width)
      position, slot = unit.position, slot_of(unit.tile)
      k, v = k_smem.at[slot], v_smem.at[slot]
      if width < size:
        within = pl.multiple_of(lax.rem(position, jnp.int32(size)), width)
        k, v = k.at[pl.ds(within, width)], v.at[pl.ds(within, width)]

      def prepare_next():
        pl.when(unit.ends)(pass_turn)

        @pl.when(jnp.logical_not(unit.ends) & unit.closes)
        def _():
          mosaic.barrier_wait(k_full.at[slot_of(unit.tile + 1)])

      seen = []  # filled while the product is traced

      def meanwhile():
        pass_turn()
        if masked:  # looked up again: what is held takes registers
          tile, _ = item.again()
          seen[:] = tile, _seen(inputs, c, wg, tile, position, interpret)

      logits = backend.matmul(
        query, k, (64, width), interpret, meanwhile=meanwhile, rest=rest
      )
      _when(unit.closes, lambda: mosaic.barrier_arrive(k_free.at[slot]))
      if held < blocks:
        pl.when(unit.ends)(lambda: mosaic.barrier_arrive(q_free.at[q_slot]))

      factor = to_log2
      if inputs.soft_cap is not None:
        logits = hopper_softmax.soft_cap(logits, inputs.scale, inputs.soft_cap)
        factor = _LOG2E
      if masked:
        tile, limits = seen
        logits = backend.mask_columns(logits, *limits, interpret)
      scores = _score(logits, factor, m, masked)
      early = width - min(c.late, width - 64)  # a product takes 64 or more
      p = scores.weights(0, early)
      l = l * _across(scores.alpha, _PARTS) + _sum(p)
      p = p.astype(dtype)
      acc = backend.rescale(acc, scores.alpha, interpret)
      if c.settle:
        backend.compute_now(p, interpret)

      def v_ready():
        mosaic.barrier_wait(v_full.at[slot])
        if masked:
          clean(unit.tile, tile)

      _when(unit.opens, v_ready)
      take_turn()
      first = v if early == width else v.at[pl.ds(0, early)]
      acc = backend.start_matmul_add(acc, p, first, interpret)
      if early < width:
        p = scores.weights(early, width)
        l += _sum(p)
        last = v.at[pl.ds(early, width - early)]
        acc = backend.start_matmul_add(acc, p.astype(dtype), last, interpret)
      prepare_next()
      acc = backend.finish_matmul_add(acc, interpret)
      _when(unit.closes, lambda: mosaic.barrier_arrive(v_free.at[slot]))
      return acc, scores.m, l

    def one_unit_without_rows(i, _, stretch):
      unit = units.unit(i, stretch.width)
      slot = slot_of(unit.tile)

      def ready():
        mosaic.barrier_wait(k_full.at[slot])
        mosaic.barrier_wait(v_full.at[slot])
        if stretch.masked:
          clean(unit.tile, item.again()[0])

      def done():
        mosaic.barrier_arrive(k_free.at[slot])
        mosaic.barrier_arrive(v_free.at[slot])

      _when(unit.opens, ready)
      _when(unit.closes, done)
      take_turn()
      pass_turn()

    def walk_units(one, carry):
      for stretch in stretches:
        body = functools.partial(one, stretch=stretch)
        carry = lax.fori_loop(stretch.first, stretch.last, body, carry)
      return carry

    blocks, _, width = q_smem.shape[1:]
    held = c.query_in_registers // width  # of its blocks
    backend.wait_if(begin < end, q_full.at[backend.hidden(q_slot, interpret)])
    query, rest = q_smem.at[q_slot], None
    if held:
      query = backend.load_blocks(
        q_smem.at[q_slot, pl.ds(0, held)], begin < end, interpret
      )
    if 0 < held < blocks:
      rest = q_smem.at[q_slot, pl.ds(held, blocks - held)]
    if held == blocks:
      pl.when(begin < end)(lambda: mosaic.barrier_arrive(q_free.at[q_slot]))

    def compute():
      @pl.when(begin < end)
      def _():
        mosaic.barrier_wait(k_full.at[slot_of(begin)])
        take_turn()

      carry = (
        full((64, H), 0.0, mosaic.Layout.WGMMA),
        full((64,), -jnp.inf, by_row),
        full((64, _PARTS), 0.0, mosaic.Layout.WGMMA),
      )
      carry = walk_units(one_unit, carry)
      following = None if c.narrow else item.following()
      _finish(inputs, c, interpret, wg, item, outputs, o_smem, *carry)
      return following

    def keep_step():
      """Does without rows what `compute` does for others to go on."""
      take_turn()
      pass_turn()
      walk_units(one_unit_without_rows, None)
      if held < blocks:
        mosaic.barrier_arrive(q_free.at[q_slot])

    if not c.narrow:
      return compute()
    *_, kind = plan.unpack(item.tile[plan.ROWS])
    has_rows = wg * 64 < c.tokens_of(kind) * c.heads_of(kind)
    pl.when(has_rows)(compute)
    pl.when((begin < end) & jnp.logical_not(has_rows))(keep_step)
    return item.following()

  final = c.consumers - 1
  zero = backend.hidden(jnp.int32(0), interpret)
  pl.when(wg == final)(lambda: mosaic.barrier_arrive(turns.at[zero]))
  items.walk(walk_item)
  zero = backend.hidden(jnp.int32(0), interpret)
  # The last turn passed on must be seen.
  pl.when(wg == 0)(lambda: mosaic.barrier_wait(turns.at[zero]))
  mosaic.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores:
  """Base-2 logits of a unit, float32 [64, width], when times `factor`."""

  logits: Any
  factor: float
  m: Any  # what weights are relative to, [64], -inf before something is seen
  shift: Any  # m, or 0 where nothing was seen
  alpha: Any  # factor of the weights of units before

  def weights(self, first: int, last: int) -> Any:
    """Returns those of columns first .. last - 1."""
    logits = self.logits[:, first:last] * self.factor
    return jnp.exp2(logits - _across(self.shift, last - first))


def _score(logits, factor, m, masked):
  """Returns the scores of a unit; `masked`: whether some may be -inf."""
  most = logits.max(axis=1) * factor
  m_new = shift = jnp.where(most > m + _SLACK, most, m)
  if masked:
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  return _Scores(
    logits=logits, factor=factor, m=m_new, shift=shift, alpha=alpha
  )


def _sum(p):
  """Sums of each row's columns, [64, _PARTS]."""
  return functools.reduce(  # sum() would begin by adding to 0
    operator.add,
    [p[:, i : i + _PARTS] for i in range(0, p.shape[1], _PARTS)],
  )


def _finish(inputs, c, interpret, wg, item, outputs, o_smem, acc, m, l):
  """Writes what an item has come to."""
  out_ref, lse_ref, sinks_ref = outputs
  tile, kv_head = item.again()  # not held while it lasts
  *_, kind = plan.unpack(tile[plan.ROWS])
  token, head = _split_rows(c, wg, kind, interpret)
  l = l.sum(axis=1)
  if sinks_ref is not None:
    acc, m, l = _add_sinks(
      inputs, c, tile, kv_head, head, sinks_ref, acc, m, l
    )
  lse = jnp.where(l == 0.0, -jnp.inf, m * (1 / _LOG2E) + jnp.log(l))
  out = acc * _across(1.0 / jnp.where(l == 0.0, 1.0, l), inputs.head_dim)
  hopper_prefill_store.store(
    inputs,
    c,
    interpret,
    wg,
    tile,
    kv_head,
    (token, head),
    (out.astype(out_ref.dtype), lse),
    (out_ref, lse_ref, o_smem),
  )


def _split_rows(c, wg, kind, interpret):
  """Which token of the tile, and which of its heads, each row is."""
  row = backend.row_numbers(interpret) + wg * 64
  tokens = c.tokens_of(kind)  # a power of two
  return row & (tokens - 1), row >> (31 - lax.clz(tokens))


def _seen(inputs, c, wg, tile, position, interpret):
  """Which columns each row sees: from the first number on, below the second.

  `position` is that of the first column.
  """
  *_, kind = plan.unpack(tile[plan.ROWS])
  token, _ = _split_rows(c, wg, kind, interpret)
  own = tile[plan.AT] + token  # each row's position
  high = tile[plan.LENGTH] - position
  if inputs.causal:
    last = jnp.minimum(own - position + 1, high)
  else:  # tokens before position 0 see nothing
    last = jnp.where(own >= 0, high, 0)
  if inputs.window is None:
    return None, last
  return own - position - (inputs.window - 1), last


def _zero_dead_rows(c, wg, v_smem, low, high, interpret):
  """Zeroes the rows of a V tile outside positions low .. high - 1."""

  def zero(i):
    part = v_smem.at[pl.ds(i * 64, 64)]
    backend.zero_dead_rows(part, low - i * 64, high - i * 64, interpret)

  for i in range(c.tile // 64):
    pl.when(wg == i % c.consumers)(functools.partial(zero, i))


def _add_sinks(inputs, c, tile, kv_head, head, sinks_ref, acc, m, l):
  """Adds each head's sink to its rows' denominators, as a logit without V."""
  G = inputs.group_size
  most = max(heads for _, heads in c.kinds)
  sink = jnp.zeros_like(m)
  _, first_head, _ = plan.unpack(tile[plan.ROWS])
  for j in range(most):
    which = jnp.minimum(first_head + j, G - 1)
    value = sinks_ref[kv_head * G + which] * _LOG2E
    sink = jnp.where(head == j, value, sink)
  # Tokens that no sequence owns have no denominator.
  sink = jnp.where(tile[plan.LENGTH] < 0, -jnp.inf, sink)
  m_new = jnp.maximum(m, sink)
  shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  l = l * alpha + jnp.exp2(sink - shift)
  return acc * _across(alpha, inputs.head_dim), m_new, l


def _when(condition, do):
  """Calls do() if `condition`, which may be known at compile time."""
  do() if condition is True else pl.when(condition)(do)


def _across(x, columns):
  return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])
