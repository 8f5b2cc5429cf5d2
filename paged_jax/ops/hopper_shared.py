"""Shared prefixes on Hopper: what many rows have in common is computed once.

Rows that begin alike map their first columns to the same pages. The plain
kernels read those pages once a row; here every query token of the batch joins
one sequence, not causal, over the pages that all rows begin with, and a row
keeps only the rest for itself:

    table   7 2 9 | 4 1      prefix: all tokens together over 7 2 9, in parts:
            7 2 9 | 3           [7 2 9) = [7 ..) [.. 2 ..) [.. 9), a CTA each
            7 2 9 | 8 5 6    own:    each row over its 4 1, or 3, or 8 5 6

    w_i = exp(lse_i - max)   out = sum w_i o_i / sum w_i,   i: own, each part

The prefix goes through the prefill kernel, whose tiles are full of the tokens
of many rows, so KV that decode would read once a row is read once a tile. Its
KV is cut into parts, as many as keep all CTAs busy; each leaves a float32
partial. The own part is a plain step on the table moved left and on shorter
lengths: attention depends on relative positions only. Sinks are its.

How many pages are shared is found on the device: the leading columns that are
the same in all rows that take part, as far as every row keeps its own query
tokens. Below a least number of tokens, or in a single row, it is 0, and then
the prefix has no tiles and the own part is the plain step.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops import (
  hopper_plan,
  hopper_prefill,
  hopper_prefill_plan,
)
from paged_jax.ops.inputs import Inputs
from paged_jax.ops.plan import Geometry

LEAST_TOKENS = 256  # a shorter prefix is not worth a kernel of its own
_MOST_SPLITS = 16
# Writing and merging a partial, in times of a tile's walk over 8k tokens.
_SPLIT_COST = 0.04

# Plain steps: what their plan is, and (lengths) -> plan.
Plain = hopper_plan.Work | hopper_prefill_plan.Work
MakePlain = Callable[[Int[Array, "B"]], Plain]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The plans of both parts, and the tables they read (K's, and V's if other).

  Token t takes part in the prefix if t < stops[t], or t < stops[0].
  """

  prefix: hopper_prefill_plan.Work
  own: Plain
  prefix_tables: tuple[Int[Array, "1 M"], ...]
  own_tables: tuple[Int[Array, "B M"], ...]
  prefix_length: Int[Array, "1"]  # tokens
  own_lengths: Int[Array, "B"]
  stops: Int[Array, "T"] | Int[Array, "1"]


def make_work(
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None,
  geometry: Geometry,
  make_own: MakePlain,
  *,
  num_ctas: int,
  num_tokens: int | None,
  least_tokens: int = LEAST_TOKENS,
) -> Work:
  """Finds the prefix and plans both parts; traceable.

  Args:
    page_table: int32 [B, M] or [B, 2, M].
    lengths: int32 [B], KV tokens of each sequence.
    query_starts: int32 [B+1], or None for one query token a sequence.
    geometry: static facts of the call.
    make_own: plans the plain step of the own part, given its lengths.
    num_ctas: CTAs that the prefix is cut for.
    num_tokens: T; None: unknown.
    least_tokens: a shorter prefix counts as none.

  Raises:
    NotImplementedError: the kernels cannot do this geometry.
  """
  if geometry.window is not None:
    raise NotImplementedError(
      f"shared_prefix with window={geometry.window}: rows see no prefix as a "
      "whole"
    )
  B, p = lengths.shape[0], geometry.page_size
  tables = (page_table,)
  if geometry.combined:
    tables = page_table[:, 0], page_table[:, 1]
  starts = query_starts
  if starts is None:
    starts = jnp.arange(B + 1, dtype=jnp.int32)
    num_tokens = B
  elif num_tokens is None:
    num_tokens = B * geometry.max_query_length
  queries = starts[1:] - starts[:-1]
  taking = queries > 0
  if query_starts is None:  # rows that are not in use
    taking &= lengths > 0
  first = jnp.where(taking, jnp.arange(B), B - 1).min()
  shared = _shared_pages(tables, lengths - queries, taking, first, p)
  shared = jnp.where(shared * p >= least_tokens, shared, 0)
  used = jnp.where(shared > 0, starts[-1], 0)
  stops = used[None]
  if query_starts is None:
    stops = jnp.where(taking, used, 0)
  prefix_length = (shared * p)[None]
  own_lengths = jnp.maximum(lengths - prefix_length, 0)
  return Work(
    prefix=_plan_prefix(prefix_length, used, geometry, num_tokens, num_ctas),
    own=make_own(own_lengths),
    prefix_tables=tuple(table[first][None] for table in tables),
    # What comes round on the right lies beyond the lengths.
    own_tables=tuple(jnp.roll(table, -shared, axis=1) for table in tables),
    prefix_length=prefix_length,
    own_lengths=own_lengths,
    stops=stops,
  )


def attend(
  inputs: Inputs,
  work: Work,
  attend_own: Callable[[Inputs, Plain], Any],
  *,
  num_ctas: int,
  interpret: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token."""
  T = inputs.num_tokens
  prefix, prefix_lse = hopper_prefill.attend(
    dataclasses.replace(
      inputs,
      k_table=work.prefix_tables[0],
      v_table=work.prefix_tables[-1],
      lengths=work.prefix_length,
      query_starts=jnp.array([0, T], jnp.int32),
      sinks=None,
      causal=False,
      max_query_length=T,
      decode=False,
    ),
    work.prefix,
    num_ctas=num_ctas,
    interpret=interpret,
  )
  own, own_lse = attend_own(
    dataclasses.replace(
      inputs,
      k_table=work.own_tables[0],
      v_table=work.own_tables[-1],
      lengths=work.own_lengths,
    ),
    work.own,
  )
  takes = jnp.arange(T, dtype=jnp.int32) < work.stops
  return _merge(prefix, prefix_lse, takes, own, own_lse)


def _shared_pages(tables, pasts, taking, first, page_size):
  """How many leading pages the rows that are `taking` part have in common.

  pasts: int32 [B], tokens before the query; the prefix is to end there.
  """
  M = tables[0].shape[1]
  column = jnp.arange(M, dtype=jnp.int32)
  shared = jnp.where(taking, pasts // page_size, M).min()
  for table in tables:
    differs = taking[:, None] & (table != table[first])
    shared = jnp.minimum(shared, jnp.where(differs, column, M).min())
  return jnp.where(taking.sum() > 1, jnp.maximum(shared, 0), 0)


def _plan_prefix(length, used, geometry, num_tokens, num_ctas):
  """The prefill plan of `used` tokens over the prefix, its KV cut in parts."""
  lib, K = hopper_prefill_plan, geometry.num_kv_heads
  config = lib.choose(dataclasses.replace(geometry, causal=False))
  tokens, _ = config.kinds[-1]
  most = -(-num_tokens // tokens) * tokens
  items = K * min(
    -(-num_tokens // tokens) * -(-geometry.num_heads // K // heads)
    for tokens, heads in config.kinds
  )
  config = dataclasses.replace(
    config,
    splits=_num_splits(items, num_ctas),
    columns=config.columns // 2,  # of float32, staged in the same memory
  )
  geometry = dataclasses.replace(geometry, causal=False, max_query_length=most)
  # Whole tiles: beyond `used` is room in the partials, and TMA can store them.
  stop = -(-used // tokens) * tokens
  starts = jnp.stack([jnp.zeros_like(stop), stop])
  whole = lib.make_work(length, starts, geometry, config, None)
  columns = [whole.tiles[:-1, j, None] for j in range(lib.END + 1)]
  part = jnp.arange(config.splits, dtype=jnp.int32)
  steps = columns[lib.END]
  columns[lib.ROWS] |= lib.pack(0, 0, 0, part)
  columns[lib.AT] = jnp.zeros_like(steps)  # all see all of the prefix
  columns[lib.BEGIN] = steps * part // config.splits
  columns[lib.END] = steps * (part + 1) // config.splits
  tiles = jnp.stack(jnp.broadcast_arrays(*columns), axis=-1)
  tiles = tiles.reshape(-1, lib.END + 1)
  # Parts without KV tiles are to be listed last.
  listed = whole.head[0] * config.splits
  empty = tiles[:, lib.BEGIN] == tiles[:, lib.END]
  unused = jnp.arange(len(tiles)) >= listed
  tiles = tiles[jnp.argsort(empty + 2 * unused)]
  # No tiles for tokens that no sequence owns: the merge does not look there.
  all_used = jnp.int32(2**30)
  tiles = lib.with_last(tiles, all_used)
  head = jnp.stack([listed, all_used])
  return lib.Work(tiles=tiles, head=head, config=config)


def _num_splits(items, num_ctas):
  """In how many parts the prefix is done soonest by `num_ctas` CTAs."""

  def cost(splits):  # rounds of CTAs, each a part of the prefix long
    partials = items * splits / num_ctas
    return -(-items * splits // num_ctas) / splits + _SPLIT_COST * partials

  return min(range(1, _MOST_SPLITS + 1), key=cost)


def _merge(prefix, prefix_lse, takes, own, own_lse):
  """Merges by LSE, in float32: one pass over the partials.

  The own part is rounded to the query's dtype by its kernel. Its weight is at
  most 1, so that is one rounding more of the size of the last one.

  prefix [S, T, N, H], prefix_lse [S, T, N]; takes [T]: where they count.
  """
  takes = takes[:, None]
  lses = [jnp.where(takes, lse, -jnp.inf) for lse in prefix_lse] + [own_lse]
  most = jnp.stack(lses).max(axis=0)
  most = jnp.where(jnp.isneginf(most), 0.0, most)
  weights = [jnp.exp(lse - most) for lse in lses]
  total = sum(weights)
  inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
  out = own.astype(jnp.float32) * (weights[-1] * inverse)[..., None]
  # Where no tile wrote, the memory may hold anything, NaN too.
  takes = takes[..., None]
  for weight, partial in zip(weights, prefix):
    partial = jnp.where(takes, partial, 0.0)
    out += partial * (weight * inverse)[..., None]
  return out.astype(own.dtype), most + jnp.log(total)
