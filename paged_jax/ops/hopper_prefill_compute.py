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

The arithmetic is in hopper_scores.py and hopper_prefill_softmax.py. Where
softmax is long beside a turn (heads of 64), p v begins with the first columns
and the weights of the last ones (`late`) are computed meanwhile.

A warpgroup without rows in an item keeps step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import (
  backend,
  hopper_prefill_store,
  hopper_prefill_units,
  hopper_scores,
  hopper_softmax,
)
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops import hopper_prefill_softmax as softmax
from paged_jax.ops.backend import mosaic

_SLACK = 8.0  # weights reach 2^8, far from what float16 overflows at


class _Buffers(NamedTuple):
  """Shared memory: query, K and V, by slot; the output, a warpgroup's rows."""

  q: Any
  k: Any
  v: Any
  out: Any


class _Barriers(NamedTuple):
  """By slot, whether it is full or free; whose turn it is; V's dead rows."""

  q_full: Any
  q_free: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any
  turns: Any
  v_clean: Any


def attend(inputs, c, items, interpret, wg, outputs, buffers, barriers):
  """Attention of this warpgroup's 64 rows of each item."""
  barriers = _Barriers(*barriers)

  def one_item(item):
    units = hopper_prefill_units.Units(
      inputs=inputs, config=c, tile=item.tile
    )
    walk = _Walk(
      inputs=inputs,
      config=c,
      interpret=interpret,
      wg=wg,
      outputs=outputs,
      smem=_Buffers(*buffers),
      barriers=barriers,
      item=item,
      units=units,
      stretches=tuple(units.stretches()),  # not while a turn is held
      q_slot=lax.rem(item.n, jnp.int32(c.query_slots)),
    )
    return walk.run()

  final = c.consumers - 1
  turns = barriers.turns
  zero = backend.hidden(jnp.int32(0), interpret)
  pl.when(wg == final)(lambda: mosaic.barrier_arrive(turns.at[zero]))
  items.walk(one_item)
  zero = backend.hidden(jnp.int32(0), interpret)
  # The last turn passed on must be seen.
  pl.when(wg == 0)(lambda: mosaic.barrier_wait(turns.at[zero]))
  mosaic.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
  """The walk of one warpgroup over the units of one item."""

  inputs: Any
  config: plan.Config
  interpret: bool
  wg: Any
  outputs: Any
  smem: _Buffers
  barriers: _Barriers
  item: Any
  units: hopper_prefill_units.Units
  stretches: tuple[hopper_prefill_units.Stretch, ...]
  q_slot: Any

  def run(self):
    """Computes the item, or keeps step; returns what follows it."""
    c, tile = self.config, self.item.tile
    some = tile[plan.BEGIN] < tile[plan.END]
    query = self._load_query(some)
    if not c.narrow:
      return self._compute(some, query)
    *_, kind = plan.unpack(tile[plan.ROWS])
    has_rows = self.wg * 64 < c.tokens_of(kind) * c.heads_of(kind)
    pl.when(has_rows)(lambda: self._compute(some, query))
    pl.when(some & jnp.logical_not(has_rows))(self._keep_step)
    return self.item.following()

  def _load_query(self, some):
    """Returns the query: what registers hold of it, or its buffer; the rest."""
    blocks, _, width = self.smem.q.shape[1:]
    held = self.config.query_in_registers // width  # of its blocks
    q_full, q_free = self.barriers.q_full, self.barriers.q_free
    slot = self.q_slot
    backend.wait_if(some, q_full.at[backend.hidden(slot, self.interpret)])
    query, rest = self.smem.q.at[slot], None
    if held:
      query = backend.load_blocks(
        self.smem.q.at[slot, pl.ds(0, held)], some, self.interpret
      )
    if 0 < held < blocks:
      rest = self.smem.q.at[slot, pl.ds(held, blocks - held)]
    if held == blocks:
      pl.when(some)(lambda: mosaic.barrier_arrive(q_free.at[slot]))
    return query, rest

  @property
  def _query_is_read(self):
    """Whether products read the query, or a part of it, from its buffer."""
    blocks, _, width = self.smem.q.shape[1:]
    return self.config.query_in_registers < blocks * width

  def _compute(self, some, query):
    """Attention of the item's rows, stored; returns the item that follows."""

    @pl.when(some)
    def _():
      first = self._slot(self.item.tile[plan.BEGIN])
      mosaic.barrier_wait(self.barriers.k_full.at[first])
      self._take_turn()

    state = hopper_scores.start(64, self.inputs.head_dim)
    state = self._each_unit(functools.partial(self._unit, query), state)
    following = None if self.config.narrow else self.item.following()
    self._finish(*state)
    return following

  def _keep_step(self):
    """Does without rows what `_compute` does for others to go on."""
    self._take_turn()
    self._pass_turn()
    self._each_unit(self._unit_without_rows, None)
    if self._query_is_read:
      mosaic.barrier_arrive(self.barriers.q_free.at[self.q_slot])

  def _each_unit(self, one, carry):
    """Carries `carry` through one(stretch, i, carry) for all units."""
    for stretch in self.stretches:
      body = functools.partial(one, stretch)
      carry = lax.fori_loop(stretch.first, stretch.last, body, carry)
    return carry

  def _unit(self, query, stretch, i, carry):
    """Online softmax over one unit."""
    acc, m, l = carry
    c, width, masked = self.config, stretch.width, stretch.masked
    dtype, interpret = self.inputs.query.dtype, self.interpret
    unit = self.units.unit(i, width)
    slot = self._slot(unit.tile)
    k, v = self.smem.k.at[slot], self.smem.v.at[slot]
    if width < c.tile:
      within = pl.multiple_of(lax.rem(unit.position, jnp.int32(c.tile)), width)
      k, v = k.at[pl.ds(within, width)], v.at[pl.ds(within, width)]
    logits, to_log2, tile = self._logits(query, k, unit, masked)
    scores = hopper_scores.score(logits, to_log2, m, masked, slack=_SLACK)
    early = width - min(c.late, width - 64)  # a product takes 64 or more
    p = scores.weights(0, early)
    l = l * backend.across(scores.alpha, hopper_scores.PARTS)
    l += hopper_scores.sums(p)
    p = p.astype(dtype)
    acc = backend.rescale(acc, scores.alpha, interpret)
    if c.settle:
      backend.compute_now(p, interpret)

    def v_ready():
      mosaic.barrier_wait(self.barriers.v_full.at[slot])
      if masked:
        self._clean(unit.tile, tile)

    _when(unit.opens, v_ready)
    self._take_turn()
    first = v if early == width else v.at[pl.ds(0, early)]
    acc = backend.start_matmul_add(acc, p, first, interpret)
    if early < width:
      p = scores.weights(early, width)
      l += hopper_scores.sums(p)
      last = v.at[pl.ds(early, width - early)]
      acc = backend.start_matmul_add(acc, p.astype(dtype), last, interpret)
    self._prepare_next(unit)
    acc = backend.finish_matmul_add(acc, interpret)
    self._leave(unit, self.barriers.v_free)
    return acc, scores.m, l

  def _logits(self, query, k, unit, masked):
    """Returns q k^T, masked; what makes base-2 logarithms of it; the plan row.

    The turn is passed on when the product is issued. The row, for what is
    `masked`, is looked up again: what is held takes registers.
    """
    inputs, interpret = self.inputs, self.interpret
    query, rest = query
    tile, limits = None, ()  # set while the product is traced

    def meanwhile():
      nonlocal tile, limits
      self._pass_turn()
      if masked:
        tile, _ = self.item.again()
        limits = self._seen(tile, unit.position)

    logits = backend.matmul(
      query, k, (64, unit.width), interpret, meanwhile=meanwhile, rest=rest
    )
    self._leave(unit, self.barriers.k_free)
    if self._query_is_read:
      q_free = self.barriers.q_free.at[self.q_slot]
      pl.when(unit.ends)(lambda: mosaic.barrier_arrive(q_free))
    to_log2 = inputs.scale * softmax.LOG2E
    if inputs.soft_cap is not None:
      logits = hopper_softmax.soft_cap(logits, inputs.scale, inputs.soft_cap)
      to_log2 = softmax.LOG2E
    if masked:
      logits = backend.mask_columns(logits, *limits, interpret)
    return logits, to_log2, tile

  def _unit_without_rows(self, stretch, i, _):
    unit = self.units.unit(i, stretch.width)
    slot = self._slot(unit.tile)

    def ready():
      mosaic.barrier_wait(self.barriers.k_full.at[slot])
      mosaic.barrier_wait(self.barriers.v_full.at[slot])
      if stretch.masked:
        self._clean(unit.tile, self.item.again()[0])

    def done():
      mosaic.barrier_arrive(self.barriers.k_free.at[slot])
      mosaic.barrier_arrive(self.barriers.v_free.at[slot])

    _when(unit.opens, ready)
    _when(unit.closes, done)
    self._take_turn()
    self._pass_turn()

  def _take_turn(self):
    mosaic.barrier_wait(self.barriers.turns.at[self.wg])

  def _pass_turn(self):
    following = lax.rem(self.wg + 1, jnp.int32(self.config.consumers))
    mosaic.barrier_arrive(self.barriers.turns.at[following])

  def _prepare_next(self, unit):
    """Waits for the next unit's K; at the end others need not wait for it."""
    pl.when(unit.ends)(self._pass_turn)

    @pl.when(jnp.logical_not(unit.ends) & unit.closes)
    def _():
      mosaic.barrier_wait(self.barriers.k_full.at[self._slot(unit.tile + 1)])

  def _leave(self, unit, free):
    """Lets the unit's tile of K, or V, be copied over when it is the last."""
    slot = self._slot(unit.tile)
    _when(unit.closes, lambda: mosaic.barrier_arrive(free.at[slot]))

  def _slot(self, kv_tile):
    number = self.item.done + (kv_tile - self.item.tile[plan.BEGIN])
    return lax.rem(number, jnp.int32(self.config.stages))

  def _clean(self, kv_tile, tile):
    """Zeroes what is dead of V, each warpgroup its part of the rows."""
    size, window = self.config.tile, self.inputs.window
    position, length = kv_tile * size, tile[plan.LENGTH]
    low = 0 if window is None else tile[plan.LOW]
    dead = length - position < size
    if window is not None:
      dead |= low - position > 0

    @pl.when(dead)
    def _():
      v = self.smem.v.at[self._slot(kv_tile)]
      first, last = low - position, length - position
      _zero_dead_rows(self.config, self.wg, v, first, last, self.interpret)
      backend.meet(self.barriers.v_clean)

  def _seen(self, tile, position):
    """Which columns each row sees: from the first number on, below the second.

    `position` is that of the first column.
    """
    token, _ = self._split_rows(tile)
    own = tile[plan.AT] + token  # each row's position
    high = tile[plan.LENGTH] - position
    if self.inputs.causal:
      last = jnp.minimum(own - position + 1, high)
    else:  # tokens before position 0 see nothing
      last = jnp.where(own >= 0, high, 0)
    if self.inputs.window is None:
      return None, last
    return own - position - (self.inputs.window - 1), last

  def _finish(self, acc, m, l):
    """Writes what the item has come to."""
    out_ref, lse_ref, sinks_ref = self.outputs
    tile, kv_head = self.item.again()  # not held while it lasts
    token, head = self._split_rows(tile)
    l = l.sum(axis=1)
    if sinks_ref is not None:
      acc, m, l = softmax.add_sinks(
        self.inputs, self.config, tile, kv_head, head, sinks_ref, acc, m, l
      )
    out, lse = softmax.normalise(acc, m, l)
    hopper_prefill_store.store(
      self.inputs,
      self.config,
      self.interpret,
      self.wg,
      tile,
      kv_head,
      (token, head),
      (out.astype(out_ref.dtype), lse),
      (out_ref, lse_ref, self.smem.out),
    )

  def _split_rows(self, tile):
    """Which token of the tile, and which of its heads, each row is."""
    *_, kind = plan.unpack(tile[plan.ROWS])
    row = backend.row_numbers(self.interpret) + self.wg * 64
    tokens = self.config.tokens_of(kind)  # a power of two
    return row & (tokens - 1), row >> (31 - lax.clz(tokens))


def _zero_dead_rows(c, wg, v_smem, low, high, interpret):
  """Zeroes the rows of a V tile outside positions low .. high - 1."""

  def zero(i):
    part = v_smem.at[pl.ds(i * 64, 64)]
    backend.zero_dead_rows(part, low - i * 64, high - i * 64, interpret)

  for i in range(c.tile // 64):
    pl.when(wg == i % c.consumers)(functools.partial(zero, i))


def _when(condition, do):
  """Calls do() if `condition`, which may be known at compile time."""
  do() if condition is True else pl.when(condition)(do)
