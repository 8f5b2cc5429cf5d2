"""Prefill on Hopper: packed ragged queries by a persistent, pipelined kernel.

A CTA takes one work item after the other (hopper_prefill_items.py) from a list
(hopper_prefill_plan.py). One warpgroup fetches, the others compute, 64 rows
each:

    producer                          consumer
    for each item:                    for each item:
      for each KV tile:                 for each unit i:
        wait for a free slot              wait K;  s = q k_i^T
        copy K's pages                    pass the turn;  softmax of s
        (first tile: copy the queries)    wait V;  take the turn
        copy V's pages                    acc += p v_i
                                        write acc / l

The consumers take turns on the tensor cores: while one has softmax to do, the
other multiplies (p v_i and then q k_{i+1}). A unit (hopper_prefill_units.py) is
a KV tile that all rows see whole, or a part of one that some row does not: only
those are masked, and parts that no row sees are left out. The copies of the
next item run ahead of the end of this one, its output leaves while the next one
begins. The queries of an item are held in registers, as far as those go (128
columns; with tiles of 256 positions, none): shared memory is busy enough with K
and V.

Dead slots must not be seen, not even as 0 * NaN. Pages without a live position
are not copied, and in a tile that is not live throughout the dead rows of V are
overwritten by zeros. Nothing is read beyond a table row's M entries.

Rows of a tile beyond its tokens hold whatever follows in the query, and rows
are independent: what comes of them is not written. Tokens that no sequence owns
get tiles of their own, behind the list, which write 0 and -inf.

Source: the schedule is that of FlashAttention-3, https://arxiv.org/abs/2407.08608
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import (
  backend,
  hopper_prefill_compute,
  hopper_prefill_fetch,
  hopper_prefill_items,
)
from paged_jax.ops import hopper_prefill_plan as plan_lib
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs


def attend(
  inputs: Inputs, work: plan_lib.Work, *, num_ctas: int, interpret: bool
) -> tuple[Float[Array, "*S T N H"], Float[Array, "*S T N"]]:
  """Returns the attention output and the natural-log LSE of every token.

  With `splits` in the plan's config: those of each split, in float32, where
  rows of tokens that the plan does not list are whatever they were.
  """
  c, (T, N, H) = work.config, inputs.query.shape
  dtype = inputs.query.dtype
  tables = [inputs.k_table] + ([inputs.v_table] if inputs.combined else [])
  sinks = () if inputs.sinks is None else (inputs.sinks,)
  out_dtype, out_rows = dtype, c.out_rows(T)
  lse_shape = (N, out_rows)  # neighbours are stored together
  if c.splits:
    out_dtype, out_rows = jnp.float32, c.splits * out_rows
    lse_shape = (out_rows, N)  # as the merge wants it
  barrier = mosaic.Barrier
  stage = mosaic.SMEM(
    (c.stages, c.tile, H), dtype, transforms=backend.tiled(H, dtype)
  )
  # Sequences begin at any row: where queries and output are copied.
  blocks, width, of_query = backend.blocked(H, dtype)
  out_blocks, out_width, of_out = backend.blocked(c.columns, out_dtype)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, num_ctas, interpret),
    name="paged_prefill",
    grid=(num_ctas,),
    grid_names=("cta",),
    out_shape=(
      jax.ShapeDtypeStruct((out_rows, N * H), out_dtype),
      jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    ),
    scratch=(
      mosaic.SMEM(
        (c.query_slots, blocks, c.rows, width), dtype, transforms=of_query
      ),
      stage,
      stage,
      mosaic.SMEM(
        (out_blocks, c.rows, out_width), out_dtype, transforms=of_out
      ),
      barrier(
        num_arrivals=blocks * max(heads for _, heads in c.kinds),
        num_barriers=c.query_slots,
      ),
      barrier(num_arrivals=c.copies, num_barriers=2 * c.stages),
      barrier(
        num_arrivals=c.consumers,
        num_barriers=c.query_slots + 2 * c.stages + 1,
      ),
      barrier(num_barriers=c.consumers + hopper_prefill_items.AHEAD),
      *hopper_prefill_items.scratch(c, interpret),
    ),
    num_warpgroups=c.consumers + 1,
    interpret=interpret,
  )
  query = inputs.query.reshape(T, N * H)
  if interpret:  # a copy may run over the end: TMA fills up, this one raises
    query = jnp.pad(query, ((0, c.rows), (0, 0)))
  folded = (-1, inputs.page_size, H)  # [L * P * K, p, H]
  out, lse = kernel(
    query,
    inputs.k_pages.reshape(folded),
    inputs.v_pages.reshape(folded),
    work.tiles,
    work.head,
    inputs.layer.reshape(1),
    *tables,
    *sinks,
  )
  if c.splits:
    out = out.reshape(c.splits, -1, N, H)[:, :T]
    return out, lse.reshape(c.splits, -1, N)[:, :T]
  return out.reshape(T, N, H), lse.T


def _kernel(inputs, c, num_ctas, interpret, *refs):
  """Dispatches the warpgroups; `inputs` is used for its static facts only."""
  num_tables = 2 if inputs.combined else 1
  q_ref, k_ref, v_ref, tiles_ref, head_ref, layer_ref = refs[:6]
  tables, refs = refs[6 : 6 + num_tables], refs[6 + num_tables :]
  sinks_ref = None
  if inputs.sinks is not None:
    sinks_ref, *refs = refs
  out_ref, lse_ref, q_smem, k_smem, v_smem, o_smem, *refs = refs
  q_full, full, done, passed, *shared = refs
  k_full, v_full = backend.split_barriers(full, c.stages, c.stages)
  q_free, k_free, v_free, v_clean = backend.split_barriers(
    done, c.query_slots, c.stages, c.stages, 1
  )
  turns, item_full = backend.split_barriers(
    passed, c.consumers, hopper_prefill_items.AHEAD
  )
  barriers = (
    q_full, q_free, k_full, v_full, k_free, v_free, turns, v_clean.at[0]
  )
  wg = lax.axis_index("wg")
  backend.wait_for_previous_kernel(interpret)
  backend.start_next_kernel(interpret)

  items = hopper_prefill_items.Items(
    inputs=inputs,
    config=c,
    tiles=tiles_ref,
    head=head_ref,
    cta=lax.axis_index("cta"),
    num_ctas=num_ctas,
    counter=None if interpret else backend.counter(),
    shared=(*shared, item_full),
  )

  @pl.when(wg == c.consumers)
  def _():
    backend.set_max_registers(c.registers[0], "decrease", interpret)
    backend.each_warp(
      functools.partial(
        hopper_prefill_fetch.fetch,
        inputs,
        c,
        items,
        interpret,
        layer_ref[0],
        (q_ref, k_ref, v_ref, *tables),
        (q_smem, k_smem, v_smem),
        barriers,
      ),
      interpret,
    )

  @pl.when(wg < c.consumers)
  def _():
    backend.set_max_registers(c.registers[1], "increase", interpret)
    rows = pl.ds(wg * 64, 64)
    hopper_prefill_compute.attend(
      inputs,
      c,
      items,
      interpret,
      wg,
      (out_ref, lse_ref, sinks_ref),
      (q_smem.at[:, :, rows], k_smem, v_smem, o_smem.at[:, rows]),
      barriers,
    )
