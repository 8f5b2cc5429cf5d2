"""Paged decode on Hopper: a persistent, warp-specialised Pallas kernel.

Each CTA walks its piece of the line of pages (hopper_plan.py). One warpgroup
fetches, one or two compute:

    producer                              consumer
    for each segment:                     for each segment:
      copy the query rows                   wait for the query rows
      for each tile:                        for each tile:
        wait until the slot is free           wait K;  s = q k^T
        copy the live pages of K, then V      mask, online softmax
                                              wait V;  acc += p v
                                            write acc / l and log2-sum-exp

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

Two computing warpgroups share either the query rows (when those are many) or
the rows of each tile; in the latter case each has a softmax of its own.

The partial result of a segment in a warpgroup is float32 [rows, H], normalised,
with its log2-sum-exp; hopper_merge.py makes the output of them.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import backend, hopper_fetch, hopper_plan, hopper_softmax
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


def partials(
  inputs: Inputs, work: hopper_plan.Work, *, interpret: bool
) -> tuple[Float[Array, "partials rows H"], Float[Array, "partials rows"]]:
  """Returns every CTA's share of every segment, float32, and its log2-LSE.

  Rows of a partial are query tokens times token rows; see the module. Entries
  that no CTA owns are never written.
  """
  c, H = work.config, inputs.head_dim
  dtype = inputs.query.dtype
  folded = (-1, c.kb * inputs.page_size, H)  # [L * P * bundles, kb * p, H]
  rows = 64 * c.warpgroups
  tables = [inputs.k_table] + ([inputs.v_table] if inputs.combined else [])
  tiled = _tiled(H, dtype)
  barrier = mosaic.Barrier
  stage = mosaic.SMEM((c.stages, c.tile, H), dtype, transforms=tiled)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, interpret),
    name="paged_decode",
    grid=(work.num_ctas,),
    grid_names=("cta",),
    out_shape=(
      jax.ShapeDtypeStruct((work.num_partials, c.rows, H), jnp.float32),
      jax.ShapeDtypeStruct((work.num_partials, c.rows), jnp.float32),
    ),
    scratch=(
      mosaic.SMEM(
        (c.query_slots, 64 * c.consumers, H), dtype, transforms=tiled
      ),
      stage,
      stage,
      mosaic.SMEM(
        (c.staging, rows, c.columns),
        jnp.float32,
        transforms=_tiled(c.columns, jnp.float32),
      ),
      mosaic.SMEM((rows,), jnp.float32),
      barrier(num_arrivals=c.block_tokens, num_barriers=c.query_slots),
      barrier(num_arrivals=c.warpgroups, num_barriers=c.query_slots),
      barrier(num_arrivals=c.copies, num_barriers=c.stages),
      barrier(num_arrivals=c.copies, num_barriers=c.stages),
      barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
      barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
      barrier(num_arrivals=c.consumers),
    ),
    num_warpgroups=c.warpgroups + 1,
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
  num_tables = 2 if inputs.combined else 1
  q_ref, k_ref, v_ref, ctas_ref, sequences_ref, layer_ref = refs[:6]
  tables = refs[6 : 6 + num_tables]
  o_ref, lse_ref, q_smem, k_smem, v_smem, o_smem, lse_smem = refs[
    6 + num_tables : 13 + num_tables
  ]
  *barriers, v_clean = refs[13 + num_tables :]
  cta = lax.axis_index("cta")
  wg = lax.axis_index("wg")
  # The plan is older than any kernel that may still run: read it ahead.
  start = tuple(ctas_ref[cta, i] for i in range(11))
  backend.wait_for_previous_kernel(interpret)
  backend.start_next_kernel(interpret)
  walk = functools.partial(_walk, c, sequences_ref, start)

  @pl.when(wg == c.warpgroups)
  def _():
    hopper_fetch.fetch(
      inputs,
      c,
      walk,
      interpret,
      layer_ref[0],
      (q_ref, k_ref, v_ref, *tables),
      (q_smem, k_smem, v_smem),
      barriers,
    )

  @pl.when(wg < c.warpgroups)
  def _():
    stage = pl.ds(wg * 64, 64)
    rows = stage if c.consumers > 1 else pl.ds(0, 64)
    part = pl.ds(wg * c.part, c.part) if c.splits > 1 else pl.ds(0, c.tile)
    hopper_softmax.attend(
      inputs,
      c,
      walk,
      interpret,
      wg,
      (o_ref, lse_ref, cta),
      (
        q_smem.at[:, rows],
        k_smem.at[:, part],
        v_smem.at[:, part],
        o_smem.at[:, stage],
        lse_smem.at[stage],
      ),
      (*barriers, v_clean),
    )


def _walk(c, sequences_ref, start, body):
  """Calls `body` for each segment of this CTA's piece of the line.

  body(b, segment, sequence, begin, end, tiles, done, n): positions begin ..
  end - 1, in whole units, of `segment` of sequence b, whose plan row is
  `sequence`; `done` tiles and `n` segments came before.

  Returns:
    The numbers of tiles and of segments.
  """
  units, b, segment, unit, *sequence = start

  def one(carry):
    left, b, segment, unit, done, n, sequence = carry
    count = jnp.minimum(sequence[hopper_plan.UNITS] - unit, left)
    last = segment + 1 >= c.segments
    b_next = jnp.where(last, sequence[hopper_plan.NEXT], b)
    # Issued now, needed after the tiles: their latency is hidden.
    following = tuple(sequences_ref[b_next, i] for i in range(7))
    begin = (sequence[hopper_plan.FIRST] + unit) * c.step
    tiles = lax.div(count + (c.copies - 1), _i32(c.copies))
    body(
      b, segment, sequence, begin, begin + count * c.step, tiles, done, n
    )
    segment = jnp.where(last, 0, segment + 1)
    unit = jnp.zeros_like(unit)
    return left - count, b_next, segment, unit, done + tiles, n + 1, following

  zero = _i32(0)
  carry = (units, b, segment, unit, zero, zero, tuple(sequence))
  *_, done, n, _ = lax.while_loop(lambda carry: carry[0] > 0, one, carry)
  return done, n


def _tiled(columns, dtype):
  """Layout that TMA writes and WGMMA reads: 8-row tiles, swizzled."""
  row_bytes = columns * jnp.dtype(dtype).itemsize
  swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
  tile = (8, swizzle // jnp.dtype(dtype).itemsize)
  return (mosaic.TilingTransform(tile), mosaic.SwizzleTransform(swizzle))


def _i32(x):
  return jnp.array(x, jnp.int32)
