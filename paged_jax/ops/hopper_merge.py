"""Parts of a segment, where several CTAs have computed it, and their sum.

The CTA that has the first part of a segment writes the segment's output. The
others leave what they have come to in memory, and raise a flag:

    line of work    |  segment 0      |  segment 1         |  segment 2  |
    CTAs               3    |    2        |     1      |        0
                         <--2--              <-----1-----
                                                  <---------0---

(3 waits for 2; 2 for 1 and 0). A CTA has at most one segment to wait for, which
its share of the line ends in.

Parts are settled states (hopper_state.py), added in the order of the line. All
warpgroups share in it, some neighbouring rows at a time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import (
  backend,
  hopper_fetch,
  hopper_plan,
  hopper_state,
  hopper_tuning,
)
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


class Split(NamedTuple):
  """A segment in parts: numbers first .. first + own + others - 1.

  All are int32 scalars.
  """

  segment: Any
  query_start: Any  # of its sequence
  query_length: Any
  first: Any
  own: Any  # parts that this CTA has written
  others: Any  # parts that others hand over


class _Batch(NamedTuple):
  """What is added up at a time, as much as registers hold."""

  rows: int
  parts: int


def memory(
  inputs: Inputs, work: hopper_plan.Work
) -> list[jax.ShapeDtypeStruct]:
  """Returns what parts take: acc by row; m by row, then l; flags."""
  c, parts = work.config, work.num_parts
  acc = jax.ShapeDtypeStruct((parts, c.rows * inputs.head_dim), jnp.float32)
  sums = jax.ShapeDtypeStruct((parts, 2 * c.rows), jnp.float32)
  return [acc, sums, backend.flags(parts * c.consumers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """The parts of segments in memory, and where their sums go.

  The number of a part is its place in the line of work. Computing warpgroups
  write their rows of it, and have a flag each.
  """

  inputs: Inputs
  config: hopper_tuning.Config
  interpret: bool
  most: int  # parts to wait for at a time, at most
  memory: tuple[Any, Any, Any]  # as `memory` says
  sinks: Any  # in global memory, or None
  outputs: tuple[Any, Any]  # results and their LSE

  def write(self, wg, part, state):
    """Writes a computing warpgroup's rows of a part."""
    acc, sums, _ = self.memory
    count = self.config.warpgroup_rows
    layout = backend.in_registers(count).reduce(1)
    row = mosaic.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    if self.config.consumers > 1:
      row += wg * 64
    rows = self.config.rows
    place = jnp.where(row < rows, part, -1)
    store = functools.partial(backend.store_rows, interpret=self.interpret)
    store(acc, state.acc, place, row * self.inputs.head_dim)
    store(sums, state.m, place, row)
    store(sums, state.l, place, row + rows)

  def hand_over(self, wg, part):
    """Lets another CTA read the rows that this warpgroup has written."""
    *_, flags = self.memory
    backend.raise_flag(flags, self._flag(wg, part), self.interpret)

  def wait(self, split):
    """Waits, in one warpgroup, for the parts that others hand over."""
    _, sums, flags = self.memory
    for wg in range(self.config.consumers):
      first = self._flag(wg, split.first + split.own)
      there = backend.take_flags(
        flags, first, split.others, self.most, self.interpret
      )
      if self.interpret:  # it does not wait: a wrong order is to be seen

        @pl.when(jnp.logical_not(there))
        def _():
          for row in range(self.config.rows):
            sums[split.first, row] = jnp.float32(jnp.nan)

  def merge(self, split, helper, helpers):
    """Writes a segment's output, in warpgroups 0 .. helpers - 1."""
    few = split.own + split.others <= self._few.parts
    for some, batch in ((few, self._few), (jnp.logical_not(few), self._many)):
      one = functools.partial(self._merge, batch, split, helper, helpers)
      pl.when(some)(one)

  def _merge(self, batch, split, helper, helpers):
    c = self.config
    bundle, block = _divmod(split.segment, c.row_blocks)
    block *= c.block_tokens
    tokens = jnp.clip(split.query_length - block, 0, c.block_tokens)
    token = split.query_start + block
    groups = -(-c.heads // batch.rows)

    def one(i, _):
      j, group = _divmod(helper + i * helpers, groups)
      lead = group * batch.rows
      self._merge_rows(batch, split, token + j, j, bundle, lead)

    mine = tokens * groups - helper + (helpers - 1)
    lax.fori_loop(0, lax.div(mine, jnp.int32(helpers)), one, None)

  def _merge_rows(self, batch, split, token, j, bundle, lead):
    """Merges heads of a bundle, from `lead` on, of its j-th token."""
    inputs, c, rows = self.inputs, self.config, batch.rows
    H = inputs.head_dim
    query_row = hopper_fetch.query_row(inputs, c, token, bundle)
    begin = j * c.token_rows + hopper_fetch.row_shift(c, query_row)
    row = jnp.minimum(begin + lead, c.rows - rows)
    head = row - begin  # of the bundle, that row's, if it is one's
    number = bundle * c.heads + head
    count = split.own + split.others
    rounds = lax.div(count + (batch.parts - 1), jnp.int32(batch.parts))
    some = functools.partial(self._add, batch, row, split.first, count)
    state = lax.fori_loop(0, rounds, some, self._start(rows))
    if self.sinks is not None:
      sink = self._numbers(self.sinks, (), number, rows)
      state = hopper_state.add_sink(state, sink, self._across)
    out, lse = hopper_state.normalise(state, self._across)
    out_ref, lse_ref = self.outputs
    span = lead - head, c.heads - head
    out = out.astype(out_ref.dtype)
    backend.store_span(
      out_ref, token, number * H, out, *span, H, self.interpret
    )
    backend.store_numbers(
      lse_ref, token, number, lse, *span, rows, H, self.interpret
    )

  def _start(self, rows):
    size = rows * self.inputs.head_dim
    number = functools.partial(backend.full_numbers, size)
    return hopper_state.State(
      backend.full_strided(size, 0.0), number(-jnp.inf), number(0.0)
    )

  def _add(self, batch, row, first, count, i, state):
    """Adds the i-th batch of `count` parts, of rows from `row` on."""
    acc_ref, sums_ref, _ = self.memory
    H = self.inputs.head_dim
    size = batch.rows * H
    parts = []
    for k in range(batch.parts):
      at = i * batch.parts + k
      part = first + jnp.minimum(at, count - 1)
      data = acc_ref.at[part, pl.ds(row * H, size)]
      acc = mosaic.load(data, layout=backend.strided(size))
      m = self._numbers(sums_ref, (part,), row, batch.rows)
      l = self._numbers(
        sums_ref, (part,), row + self.config.rows, batch.rows
      )
      m = jnp.where(at < count, m, -jnp.inf)
      parts.append(hopper_state.State(acc, m, l))
    return hopper_state.join(state, *parts, across=self._across)

  def _numbers(self, ref, place, first, rows):
    return backend.load_numbers(
      ref, place, first, rows, self.inputs.head_dim, self.interpret
    )

  def _across(self, x, acc):
    return backend.widen(x, acc.shape[0], self.interpret)

  @property
  def _few(self) -> _Batch:
    """What suits few parts: many rows."""
    rows = 16 if self.inputs.head_dim <= 128 else 8
    return _Batch(min(rows, self.config.rows), 4 // self.config.consumers)

  @property
  def _many(self) -> _Batch:
    """What suits many: few rows, 16 to 32 bytes of acc a thread."""
    rows = 4 if self.inputs.head_dim >= 128 else 8
    parts = 16 if rows * self.inputs.head_dim <= 512 else 8
    return _Batch(rows, parts // self.config.consumers)

  def _flag(self, wg, part):
    *_, flags = self.memory
    return wg * (flags.shape[0] // self.config.consumers) + part


def _divmod(x, y):
  return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))
