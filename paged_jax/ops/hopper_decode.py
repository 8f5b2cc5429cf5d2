"""Paged decode on Hopper: a persistent, warp-specialised Pallas kernel.

Each CTA walks its share of the line of pages (hopper_plan.py). One warpgroup
fetches, as far ahead as hopper_pace.py lets it, one computes, or two that share
the query rows when those are many:

    producer                              consumer
    for each segment:                     for each segment:
      copy the query rows                   wait for the query rows
      for each tile:                        for each tile:
        wait until it may go on               wait K;  s = q k^T
        copy the live pages of K, then V      mask, online softmax
                                              wait V;  acc += p v
                                            write acc / l and log-sum-exp

A tile is `tile` rows of keys in shared memory: some pages, each [kb * p, H],
the p tokens of kb neighbouring heads (one TMA copy, as they lie together in the
pool). A query tile is 64 rows: for each query token the kb * G heads that read
this bundle, and those around them that complete groups of 8 rows; where 32 rows
are enough, groups of 8 lie 16 rows apart (hopper_softmax.py). With kb > 1
logits of a row and another head's column are masked; the rows would be padding
otherwise, so this is free. What the rows around a token's own compute is never
read, and rows are independent, so garbage in them stays there.

Dead slots must not be seen, not even as 0 * NaN. Pages without a live position
are not copied (the copy is predicated off, its arrival still counts); in a tile
that is not live throughout the dead rows of V are overwritten by zeros. Logits
are masked by position. Nothing is read beyond a table row's M entries.

A segment that a CTA computes as a whole is written as it is to be. What others
are parted into is put together by the CTA that has the first part, which waits
for the others' (hopper_merge.py).
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import (
  backend,
  hopper_fetch,
  hopper_merge,
  hopper_pace,
  hopper_plan,
  hopper_softmax,
  hopper_tuning,
)
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


class Stretch(NamedTuple):
  """What a CTA computes in one go: pages of one segment, or all of them."""

  b: Any  # sequence
  segment: Any  # which of its segments
  sequence: Any  # its plan row
  begin: Any  # first position
  end: Any  # past the last position, in whole units
  tiles: Any
  done: Any  # tiles of this CTA before
  n: Any  # stretches of this CTA before
  head: Any  # whether this CTA has the segment's first part
  item: Any  # of the segment: its first unit (EQUAL), or which piece it is
  ended: Any  # whether it is the segment's last one
  goes_on: Any  # whether the next stretch, if it is of the segment, is here
  part: Any  # number of the part, if it is not all of the segment
  split: hopper_merge.Split  # `others` is right for the last stretch only
  next_b: Any  # sequence and first position of the next stretch
  next_begin: Any


def attend(
  inputs: Inputs, work: hopper_plan.Work, *, interpret: bool
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the output and the natural-log LSE, sinks included."""
  c, H = work.config, inputs.head_dim
  dtype = inputs.query.dtype
  folded = (-1, c.kb * inputs.page_size, H)  # [L * P * bundles, kb * p, H]
  rows = 64 * c.consumers
  tables = [inputs.k_table] + ([inputs.v_table] if inputs.combined else [])
  tiled = backend.tiled(H, dtype)
  barrier = mosaic.Barrier
  stage = mosaic.SMEM((c.stages, c.tile, H), dtype, transforms=tiled)
  T, N, _ = inputs.query.shape
  out_shape = [
    jax.ShapeDtypeStruct((T, N * H), dtype),
    jax.ShapeDtypeStruct((T, N), jnp.float32),
  ]
  if c.cut != hopper_tuning.WHOLE:
    out_shape += hopper_merge.memory(inputs, work)
  if c.paced:
    out_shape.append(hopper_pace.memory())
  sinks = () if inputs.sinks is None else (inputs.sinks,)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, work.num_ctas, interpret),
    name="paged_decode",
    grid=(1 if interpret else work.num_ctas,),
    grid_names=("cta",),
    out_shape=out_shape,
    scratch=(
      mosaic.SMEM((c.query_slots, rows, H), dtype, transforms=tiled),
      stage,
      stage,
      barrier(num_arrivals=c.query_copies, num_barriers=c.query_slots),
      barrier(num_arrivals=c.copies, num_barriers=2 * c.stages),
      barrier(
        num_arrivals=c.consumers,
        num_barriers=c.query_slots + 2 * c.stages + 1,
      ),
      barrier(num_arrivals=c.consumers + 1),
      mosaic.SMEM((len(hopper_merge.Split._fields),), jnp.int32),
    ),
    num_warpgroups=c.consumers + 1,
    interpret=interpret,
  )
  out, lse, *_ = kernel(
    _query_rows(inputs, c, interpret),
    inputs.k_pages.reshape(folded),
    inputs.v_pages.reshape(folded),
    work.shares,
    work.sequences,
    inputs.layer.reshape(1),
    *tables,
    *sinks,
  )
  return out.reshape(T, N, H), lse


def _query_rows(inputs, c, interpret):
  """Query as [T * N, H], padded where a copy of token rows needs it."""
  rows = inputs.num_tokens * inputs.num_heads
  # A copy may run over the end: TMA fills with zeros, the interpreter raises.
  over = c.token_rows if interpret else 0
  padded = -(-max(rows + over, c.token_rows) // 8) * 8
  query = inputs.query.reshape(rows, inputs.head_dim)
  if padded == rows:
    return query
  return jnp.pad(query, ((0, padded - rows), (0, 0)))


def _kernel(inputs, c, shares, interpret, *refs):
  """Hands out shares; `inputs` is used for its static facts only."""
  share = functools.partial(_share, inputs, c, shares, interpret, refs)
  # The last one first, see hopper_plan.py.
  if not interpret:
    share(shares - 1 - lax.axis_index("cta"))
    return
  # Simulated, CTAs run one after the other, and what one wrote may not be read
  # by the next: a single one takes all shares.
  lax.fori_loop(0, shares, lambda i, _: share(shares - 1 - i), None)


class _Memory(NamedTuple):
  """What a CTA works with, in global and shared memory."""

  query: Any
  pools: tuple[Any, Any]  # K, V
  shares: Any  # of the plan
  sequences: Any
  layer: Any
  tables: tuple[Any, ...]  # K's, and V's if it has its own
  sinks: Any  # or None
  outputs: tuple[Any, Any]  # results, their LSE
  parts: tuple[Any, ...]  # where segments may be split
  counter: Any  # of tiles, see hopper_pace.py, or None
  buffers: tuple[Any, Any, Any]  # query, K, V
  barriers: tuple[Any, Any, Any, Any]  # see hopper_softmax.Barriers
  split: Any  # what a fetching warp tells the others of its warpgroup


def _memory(inputs, c, refs):
  query, k, v, shares, sequences, layer, *refs = refs
  num_tables = 2 if inputs.combined else 1
  tables, refs = tuple(refs[:num_tables]), refs[num_tables:]
  sinks = None
  if inputs.sinks is not None:
    sinks, *refs = refs
  *refs, q_smem, k_smem, v_smem, q_full, full, done, finished, split = refs
  counter = None
  if c.paced:
    *refs, counter = refs
  return _Memory(
    query=query,
    pools=(k, v),
    shares=shares,
    sequences=sequences,
    layer=layer,
    tables=tables,
    sinks=sinks,
    outputs=tuple(refs[:2]),
    parts=tuple(refs[2:]),
    counter=counter,
    buffers=(q_smem, k_smem, v_smem),
    barriers=(q_full, full, done, finished),
    split=split,
  )


def _share(inputs, c, shares, interpret, refs, share):
  """Dispatches the warpgroups to work on a share."""
  memory = _memory(inputs, c, refs)
  parts = None
  if memory.parts:
    parts = hopper_merge.Parts(
      inputs=inputs,
      config=c,
      interpret=interpret,
      most=shares if c.cut == hopper_tuning.EQUAL else hopper_plan.MOST_PIECES,
      memory=memory.parts,
      sinks=memory.sinks,
      outputs=memory.outputs,
    )
  q_full, full, done, finished = memory.barriers
  k_full, v_full = backend.split_barriers(full, c.stages, c.stages)
  q_free, k_free, v_free, meeting = backend.split_barriers(
    done, c.query_slots, c.stages, c.stages, 1
  )
  barriers = q_full, q_free, k_full, v_full, k_free, v_free
  # Simulated, one after another: all go at their own speed.
  pace = hopper_pace.Pace(
    config=c,
    counter=None if interpret else memory.counter,
    num_ctas=shares,
  )
  wg = lax.axis_index("wg")
  # The plan and the page table are older than any kernel that may still run:
  # they are read ahead.
  columns = 7 if c.cut == hopper_tuning.EQUAL else 10
  start = tuple(memory.shares[share, i] for i in range(4 + columns))
  walk = functools.partial(_walk, c, memory.sequences, start, share)

  def wait():
    backend.wait_for_previous_kernel(interpret)
    backend.start_next_kernel(interpret)

  def found(split):
    for i, x in enumerate(split):
      memory.split[i] = x

  def fetch():
    hopper_fetch.fetch(
      inputs,
      c,
      walk,
      wait,
      interpret,
      (memory.query, *memory.pools, memory.layer, *memory.tables),
      memory.buffers,
      barriers,
      found,
      pace,
    )
    return hopper_merge.Split(
      *(memory.split[i] for i in range(len(hopper_merge.Split._fields)))
    )

  def compute():
    wait()
    if not inputs.decode:
      helper = share * c.consumers + wg, shares * c.consumers
      hopper_softmax.write_unowned(
        inputs, memory.sequences, *helper, memory.outputs, interpret
      )
    q_smem, *buffers = memory.buffers
    warpgroup = hopper_softmax.Warpgroup(
      inputs=inputs,
      config=c,
      interpret=interpret,
      wg=wg,
      sinks=memory.sinks,
      outputs=memory.outputs,
      parts=parts,
      buffers=(q_smem.at[:, pl.ds(wg * 64, 64)], *buffers),
      barriers=hopper_softmax.Barriers(*barriers, meeting.at[0]),
    )
    return warpgroup.attend(walk)

  split = lax.cond(wg == c.consumers, fetch, compute)
  if parts is None:
    return

  @pl.when(split.others > 0)
  def _():
    pl.when(wg == c.consumers)(lambda: parts.wait(split))
    backend.meet(finished)
    parts.merge(split, wg, c.consumers + 1)

  if interpret:  # what is written of this share is read in a later one
    backend.meet(finished)


def _walk(c, sequences_ref, start, share, begin, body, ahead=True):
  """Calls `body` for each stretch of this CTA's share of the line.

  share: which one of all.
  begin(b, position, segment, high, positions) -> carry, for the first stretch,
  which ends at `high` at the latest; positions: of all of them, about;
  body(stretch, carry) -> carry;
  ahead: whether a sequence's plan is read before the stretch that precedes it,
  which costs registers; without, `next_begin` of a stretch is not set.

  Returns:
    The numbers of tiles and of stretches, `split` of the last one, the carry.
  """
  equal = c.cut == hopper_tuning.EQUAL

  def first_unit(sequence, item):
    return item if equal else item * sequence[hopper_plan.PIECE]

  def read(b):
    return tuple(sequences_ref[b, i] for i in range(7 if equal else 10))

  def position(sequence, unit):
    return (sequence[hopper_plan.FIRST] + unit) * c.step

  def one(carry):
    left, b, segment, item, done, n, sequence, _, carry = carry
    unit = first_unit(sequence, item)
    units = sequence[hopper_plan.UNITS]
    if equal:
      taken = count = jnp.minimum(units - unit, left)
      head = unit == 0
      ended = unit + count == units
      own, rest = jnp.int32(1), units - unit - count
      # Shares are of the same size, but for the line's end.
      rest = lax.div(rest + (size - 1), size)
      part = share + b * c.segments + segment
    else:
      taken = jnp.int32(1)
      count = jnp.minimum(units - unit, sequence[hopper_plan.PIECE])
      items = sequence[hopper_plan.ITEMS]
      head = n >= item
      ended = item + 1 >= items
      own = jnp.int32(1) if c.folds else item + 1
      rest = items - 1 - item
      part = sequence[hopper_plan.OFFSET] + segment * items + item
    # If it has not ended, nothing is left (EQUAL).
    last = (equal | ended) & (segment + 1 >= c.segments)
    next_b = jnp.where(last, sequence[hopper_plan.NEXT], b)
    # Issued now, needed after the tiles: their latency is hidden.
    following = read(next_b) if ahead else None
    next_segment = jnp.where(last, 0, segment + 1)
    next_item = jnp.zeros_like(item)
    if not equal:
      next_segment = jnp.where(ended, next_segment, segment)
      next_item = jnp.where(ended, 0, item + 1)
    split = hopper_merge.Split(
      segment=segment,
      query_start=sequence[hopper_plan.QUERY_START],
      query_length=sequence[hopper_plan.QUERY_LENGTH],
      first=part - (own - 1),
      own=own,
      others=jnp.where(head, rest, 0),
    )
    carry = body(
      Stretch(
        b=b,
        segment=segment,
        sequence=sequence,
        begin=position(sequence, unit),
        end=position(sequence, unit + count),
        tiles=lax.div(count + (c.copies - 1), jnp.int32(c.copies)),
        done=done,
        n=n,
        head=head,
        item=item,
        ended=ended,
        goes_on=left > taken,
        part=part,
        split=split,
        next_b=next_b,
        next_begin=ahead
        and position(following, first_unit(following, next_item)),
      ),
      carry,
    )
    following = following or read(next_b)
    done += lax.div(count + (c.copies - 1), jnp.int32(c.copies))
    left -= taken
    next_ = left, next_b, next_segment, next_item
    return *next_, done, n + 1, following, split, carry

  size, b, segment, item, *sequence = start
  unit = first_unit(sequence, item)
  positions = first_unit(sequence, size) * c.step
  at = position(sequence, unit)
  high = jnp.minimum(sequence[hopper_plan.HIGH], at + positions)
  carry = begin(b, at, segment, high, positions)
  zero = jnp.int32(0)
  split = hopper_merge.Split(*[zero] * len(hopper_merge.Split._fields))
  carry = (size, b, segment, item, zero, zero, tuple(sequence), split, carry)
  carry = lax.while_loop(lambda carry: carry[0] > 0, one, carry)
  *_, done, n, _, split, last = carry
  return done, n, split, last
