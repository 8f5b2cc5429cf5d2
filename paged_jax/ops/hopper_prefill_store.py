"""What a warpgroup of the Hopper prefill kernel writes: output rows and LSE.

Whole blocks of tokens leave through shared memory by TMA. Where a tile ends
amid a block, or is narrow, each row is stored by itself, for the rows behind
its own belong to other sequences.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic


def store(
  inputs, c, interpret, wg, tile, kv_head, places, values, targets
):
  """Stores the rows of one warpgroup: by TMA where all are the tile's own."""
  (token, head), (out, lse) = places, values
  out_ref, lse_ref, o_smem = targets
  H, G = inputs.head_dim, inputs.group_size
  first = tile[plan.TOKEN]
  tokens_own, first_head, kind = plan.unpack(tile[plan.ROWS])
  heads_left = G - first_head
  first_head += kv_head * G
  own = (token < tokens_own) & (head < heads_left) & (head < c.heads_of(kind))
  if c.splits:
    first += plan.split_of(tile[plan.ROWS]) * c.out_rows(inputs.num_tokens)
  row = jnp.where(own, first + token, -1)

  def by_tma(tokens):
    block = min(tokens, 64)
    width = o_smem.shape[2]
    for j in range(0, H, c.columns):
      # The copies of the last item, or columns, must have been read.
      mosaic.wait_smem_to_gmem(0, wait_read_only=True)
      columns = range(j, j + c.columns, width)
      for x, column in enumerate(columns):
        backend.store_block(
          o_smem.at[x], out[:, column : column + width], interpret
        )
      mosaic.commit_smem()
      for i in range(0, 64, block):
        at = wg * 64 + i
        to = (first_head + lax.div(at, jnp.int32(tokens))) * H
        rows = pl.ds(first + lax.rem(at, jnp.int32(tokens)), block)
        for x, column in enumerate(columns):
          mosaic.copy_smem_to_gmem(
            o_smem.at[x, pl.ds(i, block)],
            out_ref.at[rows, pl.ds(to + column, width)],
          )

  one_by_one = first >= 0
  for k, (tokens, heads) in enumerate(c.kinds):
    if k == 0 and c.narrow:  # not worth its instructions
      continue
    offset = lax.rem(wg * 64, jnp.int32(tokens))
    whole = (kind == k) & (heads_left >= heads)
    whole &= tokens_own >= offset + min(tokens, 64)
    if heads * tokens < c.rows:
      whole &= (wg + 1) * 64 <= heads * tokens
    pl.when(whole)(functools.partial(by_tma, tokens))
    one_by_one &= jnp.logical_not(whole)

  @pl.when(one_by_one)
  def _():
    backend.store_rows(
      out_ref, out, row, (first_head + head) * H, interpret
    )

  # Last: the fence before a TMA store would wait for these stores too.
  if c.splits:
    backend.store_rows(lse_ref, lse, row, first_head + head, interpret)
  else:
    backend.store_rows(
      lse_ref, lse, jnp.where(own, first_head + head, -1), first + token,
      interpret,
    )
