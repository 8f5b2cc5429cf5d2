"""The computing warpgroups of the Hopper prefill kernel: online softmax.

For each KV tile of an item, in units of log2:

    s = q k^T                   then the turn is passed on
    m' = max(m, max s)          masked to -inf, where some row does not see all
    p = 2^(s - m'), a = 2^(m - m'),  l' = a l + sum p,  acc = a acc
    take the turn on the tensor cores
    acc += p v

so a turn is p v of one tile and q k^T of the next (where an item begins or
ends, one of the two), while another warpgroup has softmax to do. s and acc live
in registers in the layout of WGMMA's results, 64 rows, 16 a warp.

Where acc is large (`lazy`) m follows the maximum with some slack, so that p may
reach 2^8: then a is 1 after the first few tiles, and acc is left alone. A row's
m depends on no other row.
"""

import functools
import math

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend, hopper_prefill_store, hopper_softmax
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic

_LOG2E = math.log2(math.e)
_SLACK = 8.0  # see above; 2^8 is far from what float16 overflows at


def attend(inputs, c, items, interpret, wg, outputs, buffers, barriers):
  """Attention of this warpgroup's 64 rows of each item."""
  out_ref, lse_ref, sinks_ref = outputs
  q_smem, k_smem, v_smem, o_smem = buffers
  q_full, q_free, k_full, v_full, k_free, v_free, turns, v_clean = barriers
  H, size = inputs.head_dim, c.tile
  dtype = inputs.query.dtype
  unit = inputs.scale * _LOG2E
  by_row = mosaic.Layout.WGMMA.reduce(1)

  def take_turn():
    mosaic.barrier_wait(turns.at[wg])

  def pass_turn():
    mosaic.barrier_arrive(turns.at[lax.rem(wg + 1, _i32(c.consumers))])

  def full(shape, value, layout):
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  def finish(tile, kv_head, acc, m, l):
    """Writes what an item has come to."""
    *_, kind = plan.unpack(tile[plan.ROWS])
    token, head = _split_rows(c, wg, kind)
    if sinks_ref is not None:
      acc, m, l = _add_sinks(
        inputs, c, tile, kv_head, head, sinks_ref, acc, m, l
      )
    lse = jnp.where(l == 0.0, -jnp.inf, m * (1 / _LOG2E) + jnp.log(l))
    out = acc * _across(1.0 / jnp.where(l == 0.0, 1.0, l), H)
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

  def item(tile, kv_head, done, n):
    begin, end = tile[plan.BEGIN], tile[plan.END]
    at, length = tile[plan.AT], tile[plan.LENGTH]
    low = 0 if inputs.window is None else tile[plan.LOW]
    *_, kind = plan.unpack(tile[plan.ROWS])
    token, _ = _split_rows(c, wg, kind)
    q_slot = lax.rem(n, _i32(c.query_slots))

    def slot_of(i):
      return lax.rem(done + (i - begin), _i32(c.stages))

    def one_tile(i, carry, masked):
      acc, m, l = carry
      position = i * size
      slot = slot_of(i)

      def prepare_next():
        @pl.when(i + 1 < end)
        def _():
          mosaic.barrier_wait(k_full.at[slot_of(i + 1)])

        pl.when(i + 1 == end)(pass_turn)

      logits = backend.matmul(
        query,
        k_smem.at[slot],
        (64, size),
        interpret,
        meanwhile=pass_turn,
        rest=rest,
      )
      mosaic.barrier_arrive(k_free.at[slot])

      if rest is not None:

        @pl.when(i + 1 == end)
        def _():
          mosaic.barrier_arrive(q_free.at[q_slot])

      factor = unit  # logits times this are in units of log2
      if inputs.soft_cap is not None:
        logits = hopper_softmax.soft_cap(logits, inputs.scale, inputs.soft_cap)
        factor = _LOG2E
      if masked:
        seen = _seen(
          inputs, logits.shape, at + token, position, length - position
        )
        logits = jnp.where(seen, logits, -jnp.inf)
      most = logits.max(axis=1) * factor
      m_new = shift = jnp.maximum(m, most)
      if c.lazy:
        m_new = shift = jnp.where(most > m + _SLACK, most, m)
      if masked:
        shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
      alpha = jnp.exp2(m - shift)
      p = jnp.exp2(logits * factor - _across(shift, size))
      l = l * alpha + p.sum(axis=1)
      p = p.astype(dtype)
      if c.lazy:
        acc = backend.rescale(acc, alpha, interpret)
        backend.compute_now(p, interpret)
      else:
        acc = acc * _across(alpha, H)
        acc, l, m_new, p = lax.optimization_barrier((acc, l, m_new, p))
      mosaic.barrier_wait(v_full.at[slot])
      if masked:
        dead = length - position < size
        if inputs.window is not None:
          dead |= low - position > 0

        @pl.when(dead)
        def _():
          _zero_dead_rows(
            c, wg, v_smem.at[slot], low - position, length - position, interpret
          )
          mosaic.barrier_arrive(v_clean)
          mosaic.barrier_wait(v_clean)

      take_turn()
      acc = backend.matmul_add(
        acc, p, v_smem.at[slot], interpret, meanwhile=prepare_next
      )
      mosaic.barrier_arrive(v_free.at[slot])
      return acc, m_new, l

    blocks, _, width = q_smem.shape[1:]
    held = c.query_in_registers // width
    backend.wait_if(begin < end, q_full.at[q_slot])
    query = backend.load_blocks(
      q_smem.at[q_slot, pl.ds(0, held)], begin < end, interpret
    )
    rest = None
    if held < blocks:
      rest = q_smem.at[q_slot, pl.ds(held, blocks - held)]
    else:

      @pl.when(begin < end)
      def _():
        mosaic.barrier_arrive(q_free.at[q_slot])

    @pl.when(begin < end)
    def _():
      mosaic.barrier_wait(k_full.at[slot_of(begin)])
      take_turn()

    carry = (
      full((64, H), 0.0, mosaic.Layout.WGMMA),
      full((64,), -jnp.inf, by_row),
      full((64,), 0.0, by_row),
    )
    start, stop = _whole_tiles(inputs, c, tile)
    stretches = [(start, stop, False), (stop, end, True)]
    if inputs.window is not None:
      stretches.insert(0, (begin, start, True))
    for first, last, masked in stretches:
      one = functools.partial(one_tile, masked=masked)
      carry = lax.fori_loop(first, last, one, carry)
    finish(tile, kv_head, *carry)

  final = c.consumers - 1
  pl.when(wg == final)(lambda: mosaic.barrier_arrive(turns.at[0]))
  items.walk(item)
  pl.when(wg == 0)(take_turn)  # the last turn passed on must be seen
  mosaic.wait_smem_to_gmem(0)


def _split_rows(c, wg, kind):
  """Which token of the tile, and which of its heads, each row is."""
  by_row = mosaic.Layout.WGMMA.reduce(1)
  row = mosaic.broadcasted_iota(jnp.int32, (64,), 0, layout=by_row) + wg * 64
  splits = []
  for tokens, _ in c.kinds:
    splits.append((row & (tokens - 1), row >> (tokens.bit_length() - 1)))
  if len(splits) == 1:
    return splits[0]
  return tuple(jnp.where(kind == 0, a, b) for a, b in zip(*splits))


def _whole_tiles(inputs, c, tile):
  """The stretch of KV tiles that all rows see whole."""
  begin, end, at = (tile[j] for j in (plan.BEGIN, plan.END, plan.AT))
  own, _, _ = plan.unpack(tile[plan.ROWS])
  size = _i32(c.tile)
  seen = tile[plan.LENGTH]
  if inputs.causal:
    seen = jnp.minimum(seen, at + 1)
  elif inputs.max_query_length > 1:
    seen = jnp.where(at < 0, 0, seen)
  stop = jnp.clip(lax.div(jnp.maximum(seen, 0), size), begin, end)
  if inputs.window is None:
    return begin, stop
  low = jnp.maximum(at + own - inputs.window, 0)
  start = jnp.clip(lax.div(low + (c.tile - 1), size), begin, end)
  return start, jnp.maximum(stop, start)


def _seen(inputs, shape, own, position, high):
  """Which column each row sees.

  `own` is each row's position, `position` that of the first column; positions
  not below `high`, which counts from there, are dead.
  """
  column = mosaic.broadcasted_iota(
    jnp.int32, shape, 1, layout=mosaic.Layout.WGMMA
  )
  if inputs.causal:
    seen = column <= _across(jnp.minimum(own - position, high - 1), shape[1])
  else:  # tokens before position 0 see nothing
    seen = column < _across(jnp.where(own >= 0, high, 0), shape[1])
  if inputs.window is not None:
    seen &= column > _across(own - position - inputs.window, shape[1])
  return seen


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


def _across(x, columns):
  return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _i32(x):
  return jnp.array(x, jnp.int32)
