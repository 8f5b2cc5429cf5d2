"""Prefill on Hopper: packed ragged queries by a persistent, pipelined kernel.

A CTA takes one work item (hopper_prefill_plan.py) after the other. One
warpgroup fetches, the others compute, 64 rows each:

    producer                          consumer
    for each item:                    for each item:
      for each KV tile:                 for each KV tile i:
        wait for a free slot              wait K;  s = q k_i^T
        copy K's pages                    pass the turn;  softmax of s
        (first tile: copy the queries)    take the turn
        copy V's pages                    wait V;  acc += p v_i
                                        write acc / l

The consumers take turns on the tensor cores: while one has softmax to do, the
other multiplies (p v_i and then q k_{i+1}). Masks are applied only in KV tiles
that some row does not see whole. The copies of the next item run ahead of the
end of this one, its output leaves while the next one begins.

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
      barrier(num_arrivals=c.consumers, num_barriers=c.query_slots),
      barrier(num_arrivals=c.copies, num_barriers=c.stages),
      barrier(num_arrivals=c.copies, num_barriers=c.stages),
      barrier(num_arrivals=c.consumers, num_barriers=c.stages),
      barrier(num_arrivals=c.consumers, num_barriers=c.stages),
      barrier(num_barriers=c.consumers),
      barrier(num_arrivals=c.consumers),
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
  out_ref, lse_ref, q_smem, k_smem, v_smem, o_smem, *barriers = refs
  wg = lax.axis_index("wg")
  backend.wait_for_previous_kernel(interpret)
  backend.start_next_kernel(interpret)
  walk = functools.partial(
    _walk, inputs, c, num_ctas, lax.axis_index("cta"), tiles_ref, head_ref
  )

  @pl.when(wg == c.consumers)
  def _():
    backend.set_max_registers(c.registers[0], "decrease", interpret)
    backend.each_warp(
      functools.partial(
        hopper_prefill_fetch.fetch,
        inputs,
        c,
        walk,
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
      walk,
      interpret,
      wg,
      (out_ref, lse_ref, sinks_ref),
      (q_smem.at[:, :, rows], k_smem, v_smem, o_smem.at[:, rows]),
      barriers,
    )


def _walk(inputs, c, num_ctas, cta, tiles_ref, head_ref, body, fetching=False):
  """Calls body(tile, kv_head, done, n) for each work item of this CTA.

  `tile` is a plan row; `done` KV tiles and `n` items with some came before.

  Returns:
    The numbers of KV tiles and of items with some.
  """
  K, T = inputs.num_kv_heads, inputs.num_tokens
  listed, used = head_ref[0], head_ref[1]
  tokens, heads = c.kinds[-1]
  groups = -(-inputs.group_size // heads)
  beyond = lax.div(T - used + (tokens - 1), _i32(tokens)) * groups
  if fetching:  # nothing, for these
    beyond = 0
  items = (listed + jnp.where(used < T, beyond, 0)) * K

  def item(n):
    """Number of this CTA's n-th item; see the plan for the order."""
    back = lax.rem(n, _i32(2))
    return n * num_ctas + jnp.where(back == 1, num_ctas - 1 - cta, cta)

  def read(i):
    row = jnp.minimum(lax.div(i, _i32(K)), tiles_ref.shape[0] - 1)
    return tuple(tiles_ref[row, j] for j in range(plan_lib.END + 1))

  def listed_or_unowned(i, tile):
    """Behind the list: tokens that no sequence owns, "of length -1"."""
    z = lax.div(i, _i32(K)) - listed
    first = used + lax.div(z, _i32(groups)) * tokens
    unowned = {
      plan_lib.TOKEN: first,
      plan_lib.ROWS: plan_lib.pack(
        jnp.minimum(T - first, tokens),
        lax.rem(z, _i32(groups)) * heads,
        len(c.kinds) - 1,
      ),
      plan_lib.LENGTH: _i32(-1),
      plan_lib.BEGIN: _i32(0),
      plan_lib.END: _i32(0),
    }
    return [
      jnp.where(z >= 0, unowned[j], x) if j in unowned else x
      for j, x in enumerate(tile)
    ]

  def one(carry):
    i, r, done, n, tile = carry
    if not fetching:
      tile = listed_or_unowned(i, tile)
    following = item(r + 1)
    # Issued now, looked at after the tiles: their latency is hidden.
    tile_next = read(following)
    body(tile, lax.rem(i, _i32(K)), done, n)
    steps = tile[plan_lib.END] - tile[plan_lib.BEGIN]
    n = n + jnp.where(steps > 0, 1, 0)
    return following, r + 1, done + steps, n, tile_next

  zero = _i32(0)
  carry = cta, zero, zero, zero, read(cta)
  _, _, done, n, _ = lax.while_loop(
    lambda carry: carry[0] < items, one, carry
  )
  return done, n


def _i32(x):
  return jnp.array(x, jnp.int32)
