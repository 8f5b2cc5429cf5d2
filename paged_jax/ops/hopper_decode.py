"""Paged decode on Hopper: a persistent, warp-specialised Pallas kernel.

Each CTA walks its share of the line of pages (hopper_plan.py). One warpgroup
fetches, one computes, or two that share the query rows when those are many:

    producer                              consumer
    for each segment:                     for each segment:
      copy the query rows                   wait for the query rows
      for each tile:                        for each tile:
        wait until the slot is free           wait K;  s = q k^T
        copy the live pages of K, then V      mask, online softmax
                                              wait V;  acc += p v
                                            write acc / l and log-sum-exp

A tile is `tile` rows of keys in shared memory: some pages, each [kb * p, H],
the p tokens of kb neighbouring heads (one TMA copy, as they lie together in the
pool). A query tile is 64 rows: for each query token the kb * G heads that read
this bundle, and those around them that complete groups of 8 rows. With kb > 1
logits of a row and another head's column are masked; the rows would be padding
otherwise, so this is free. What the rows around a token's own compute is never
read, and rows are independent, so garbage in them stays there.

Dead slots must not be seen, not even as 0 * NaN. Pages without a live position
are not copied (the copy is predicated off, its arrival still counts); in a tile
that is not live throughout the dead rows of V are overwritten by zeros. Logits
are masked by position. Nothing is read beyond a table row's M entries.

A segment that a CTA computes as a whole is written as it is to be. Of others a
CTA leaves a partial result, float32 [rows, H], normalised, with its
log2-sum-exp; hopper_merge.py makes the output of those.
"""

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
  whole: Any  # whether it is all of the segment
  partial: Any  # name of the partial result, where it is not
  next_b: Any  # sequence and first position of the next stretch
  next_begin: Any


def attend(
  inputs: Inputs, work: hopper_plan.Work, *, interpret: bool
) -> tuple[jax.Array, ...]:
  """Returns the output, its LSE, and the shares of segments that are split.

  Output [T, N * width] and natural-log LSE [T, N] of segments that a CTA
  computed whole. Shares: float32 [partials, rows, width] and log2-LSE
  [partials, rows], where the plan may split segments; rows are query tokens
  times token rows, see the module. Whatever else is there, and columns from H
  on, was never written.
  """
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
    jax.ShapeDtypeStruct((T, N * c.width), dtype),
    jax.ShapeDtypeStruct((T, N), jnp.float32),
  ]
  staging = ()
  if c.cut != hopper_tuning.WHOLE:
    partials = work.num_partials, c.rows
    out_shape += [
      jax.ShapeDtypeStruct((*partials, c.width), jnp.float32),
      jax.ShapeDtypeStruct(partials, jnp.float32),
    ]
    staging = (
      mosaic.SMEM(
        (rows, c.columns),
        jnp.float32,
        transforms=backend.tiled(c.columns, jnp.float32),
      ),
      mosaic.SMEM((rows,), jnp.float32),
    )
  sinks = () if inputs.sinks is None else (inputs.sinks,)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, interpret),
    name="paged_decode",
    grid=(work.num_ctas,),
    grid_names=("cta",),
    out_shape=out_shape,
    scratch=(
      *staging,
      mosaic.SMEM((c.query_slots, rows, H), dtype, transforms=tiled),
      stage,
      stage,
      barrier(num_arrivals=c.block_tokens, num_barriers=c.query_slots),
      barrier(num_arrivals=c.copies, num_barriers=2 * c.stages),
      barrier(
        num_arrivals=c.consumers,
        num_barriers=c.query_slots + 2 * c.stages + 1,
      ),
    ),
    num_warpgroups=c.consumers + 1,
    interpret=interpret,
  )
  return kernel(
    _query_rows(inputs, c, interpret),
    inputs.k_pages.reshape(folded),
    inputs.v_pages.reshape(folded),
    work.ctas,
    work.sequences,
    inputs.layer.reshape(1),
    *tables,
    *sinks,
  )


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


def _kernel(inputs, c, interpret, *refs):
  """Dispatches the warpgroups; `inputs` is used for its static facts only."""
  q_ref, k_ref, v_ref, ctas_ref, sequences_ref, layer_ref, *refs = refs
  num_tables = 2 if inputs.combined else 1
  tables, refs = refs[:num_tables], refs[num_tables:]
  sinks_ref = None
  if inputs.sinks is not None:
    sinks_ref, *refs = refs
  out_ref, out_lse_ref, *refs = refs
  shares = staging = ()
  if c.cut != hopper_tuning.WHOLE:
    shares, staging, refs = refs[:2], refs[2:4], refs[4:]
  q_smem, k_smem, v_smem, q_full, full, done = refs
  k_full, v_full = backend.split_barriers(full, c.stages, c.stages)
  q_free, k_free, v_free, v_clean = backend.split_barriers(
    done, c.query_slots, c.stages, c.stages, 1
  )
  barriers = q_full, q_free, k_full, v_full, k_free, v_free
  cta = lax.axis_index("cta")
  wg = lax.axis_index("wg")
  # The plan and the page table are older than any kernel that may still run:
  # they are read ahead.
  columns = 7 if c.cut == hopper_tuning.EQUAL else 10
  start = tuple(ctas_ref[cta, i] for i in range(4 + columns))
  walk = functools.partial(_walk, c, sequences_ref, start, cta)

  def wait():
    backend.wait_for_previous_kernel(interpret)
    backend.start_next_kernel(interpret)

  @pl.when(wg == c.consumers)
  def _():
    hopper_fetch.fetch(
      inputs,
      c,
      walk,
      wait,
      interpret,
      (q_ref, k_ref, v_ref, layer_ref, *tables),
      (q_smem, k_smem, v_smem),
      barriers,
    )

  @pl.when(wg < c.consumers)
  def _():
    wait()
    rows = pl.ds(wg * 64, 64)
    hopper_softmax.attend(
      inputs,
      c,
      walk,
      interpret,
      wg,
      sinks_ref,
      (out_ref, out_lse_ref),
      shares,
      (q_smem.at[:, rows], k_smem, v_smem),
      tuple(x.at[rows] for x in staging),
      (*barriers, v_clean.at[0]),
    )


def _walk(c, sequences_ref, start, cta, begin, body, ahead=True):
  """Calls `body` for each stretch of this CTA's share of the line.

  begin(b, position, segment, high, share) -> carry, for the first stretch,
  which ends at `high` at the latest; share: positions of all of them, about;
  body(stretch, carry) -> carry;
  ahead: whether a sequence's plan is read before the stretch that precedes it,
  which costs registers; without, `next_begin` of a stretch is not set.

  Returns:
    The numbers of tiles and of stretches.
  """
  equal = c.cut == hopper_tuning.EQUAL

  def first_unit(sequence, item):
    return item if equal else item * sequence[hopper_plan.PIECE]

  def read(b):
    return tuple(sequences_ref[b, i] for i in range(7 if equal else 10))

  def position(sequence, unit):
    return (sequence[hopper_plan.FIRST] + unit) * c.step

  def one(carry):
    left, b, segment, item, done, n, sequence, carry = carry
    unit = first_unit(sequence, item)
    units = sequence[hopper_plan.UNITS]
    if equal:
      taken = count = jnp.minimum(units - unit, left)
      ended = True  # or nothing is left
      whole = count == units
      partial = cta + b * c.segments + segment
    else:
      taken = jnp.int32(1)
      count = jnp.minimum(units - unit, sequence[hopper_plan.PIECE])
      items = sequence[hopper_plan.ITEMS]
      ended = item + 1 >= items
      whole = items == 1
      partial = sequence[hopper_plan.OFFSET] + segment * items + item
    last = ended & (segment + 1 >= c.segments)
    next_b = jnp.where(last, sequence[hopper_plan.NEXT], b)
    # Issued now, needed after the tiles: their latency is hidden.
    following = read(next_b) if ahead else None
    next_segment = jnp.where(last, 0, segment + 1)
    next_item = jnp.zeros_like(item)
    if not equal:
      next_segment = jnp.where(ended, next_segment, segment)
      next_item = jnp.where(ended, 0, item + 1)
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
        whole=whole,
        partial=partial,
        next_b=next_b,
        next_begin=ahead
        and position(following, first_unit(following, next_item)),
      ),
      carry,
    )
    following = following or read(next_b)
    done += lax.div(count + (c.copies - 1), jnp.int32(c.copies))
    left -= taken
    return left, next_b, next_segment, next_item, done, n + 1, following, carry

  left, b, segment, item, *sequence = start
  unit = first_unit(sequence, item)
  share = first_unit(sequence, left) * c.step
  high = jnp.minimum(
    sequence[hopper_plan.HIGH], position(sequence, unit) + share
  )
  carry = begin(b, position(sequence, unit), segment, high, share)
  zero = jnp.int32(0)
  carry = (left, b, segment, item, zero, zero, tuple(sequence), carry)
  *_, done, n, _, _ = lax.while_loop(lambda carry: carry[0] > 0, one, carry)
  return done, n
