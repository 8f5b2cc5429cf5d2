"""The plan of a Hopper decode step: equal work for every CTA.

All work is one line of units (a page of one bundle of heads, what one copy
brings): sequence after sequence, in a sequence segment after segment (one
bundle of kv heads and one block of query rows), in a segment page after page.
Each CTA takes an equal share of the line, wherever its ends fall:

    line    | b=0, s=0 | b=0, s=1 | b=1, s=0        | b=1, s=1        |
    shares  |   0   |   1   |   2   |   3   |   4   |   5   |   6   |
    CTAs        6       5       4       3       2       1       0

so a ragged batch costs what an even one of the same sum does. Of a segment that
crosses shares there is a part in each; since both the share c and the segment's
place s in the line only grow along it, c + s is a number for each part, and a
segment's parts follow each other. CTAs take the shares from the last one on,
for the one with a segment's first part waits for the others (hopper_merge.py),
and CTAs of lower numbers start earlier. (All of them fit on the device at once;
should others be there too, those that are waited for come first.)

Two other ways of cutting hand out whole pieces, a line of them instead of
units, equally many to every CTA:

    FIXED   a segment is cut every so many units, by its own length alone, so
            that its result does not depend on the rest of the batch; a part is
            a piece, and its number that one's place in the line
    WHOLE   a piece is a segment, which has no parts

A row without keys has one unit all the same, of which nothing is read: so its
zeros are written as results are.

The searches compare all pairs: a few fused XLA operations, no sort, no scan.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_jax.ops import hopper_tuning
from paged_jax.ops.plan import Geometry

# Columns of Work.sequences.
UNITS, FIRST, LOW, HIGH, QUERY_START, QUERY_LENGTH, NEXT = range(7)
OFFSET, ITEMS, PIECE = range(7, 10)

# No segment is cut into more pieces (FIXED): longer ones have longer pieces.
MOST_PIECES = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """Who computes what.

  A row of `sequences`: units of each of its segments; which unit of its row is
  the first (window); first and past-the-last position that any query sees;
  first query token and number of them; next sequence with work; items of the
  line (units, or pieces) before it; items of each of its segments; units of a
  piece. A row of `shares`: number of items; the first one's sequence, segment
  and place in the segment; and the row of that sequence, so that a CTA starts
  after one read. CTA i takes the i-th one from the end. `tables`: those to read
  in place of the call's, K's and V's if it has its own, or none.
  """

  shares: Int[Array, "ctas 14"]
  sequences: Int[Array, "B 10"]
  tables: tuple[Int[Array, "B M"], ...] = ()
  max_pages: int = dataclasses.field(metadata=dict(static=True))  # M
  config: hopper_tuning.Config = dataclasses.field(metadata=dict(static=True))

  @property
  def num_ctas(self) -> int:
    return self.shares.shape[0]

  @property
  def num_parts(self) -> int:
    c, B = self.config, self.sequences.shape[0]
    if c.cut == hopper_tuning.EQUAL:
      return self.num_ctas + B * c.segments
    # A page is several units where it is larger than a tile.
    units = self.max_pages * (c.page_size // c.step)
    return B * c.segments * min(-(-units // c.piece), MOST_PIECES)


def make_work(
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None,
  geometry: Geometry,
  config: hopper_tuning.Config,
  num_ctas: int,
  max_pages: int,
) -> Work:
  """Cuts the line into `num_ctas` equal shares; traceable.

  Args:
    lengths: int32 [B], KV tokens of each sequence.
    query_starts: int32 [B+1], or None for one query token a sequence.
    geometry: static facts of the call.
    config: shape of the kernel.
    num_ctas: CTAs the kernel is launched with.
    max_pages: M, entries of a table row.
  """
  B = lengths.shape[0]
  if query_starts is None:
    query_starts = jnp.arange(B + 1, dtype=jnp.int32)
  query_length = query_starts[1:] - query_starts[:-1]
  step = config.step  # positions of a unit
  low = jnp.zeros_like(lengths)
  if geometry.window is not None:
    low = jnp.maximum(lengths - query_length - geometry.window + 1, 0)
  first = low // step
  units = jnp.maximum(-(-lengths // step) - first, 1)
  units = jnp.where(query_length > 0, units, 0)
  items, piece = units, jnp.ones_like(units)
  if config.cut == hopper_tuning.WHOLE:
    items, piece = jnp.minimum(units, 1), jnp.maximum(units, 1)
  elif config.cut == hopper_tuning.FIXED:
    longest = config.piece * MOST_PIECES
    piece = config.piece * jnp.maximum(-(-units // longest), 1)
    items = -(-units // piece)
  cost = items * config.segments
  if B <= 2048:
    before = jnp.arange(B)[None, :] <= jnp.arange(B)[:, None]
    ends = jnp.where(before, cost[None, :], 0).sum(axis=1, dtype=jnp.int32)
  else:
    ends = jnp.cumsum(cost, dtype=jnp.int32)
  starts = ends - cost
  total = ends[-1]
  each = jnp.maximum(-(-total // num_ctas), 1)
  cuts = jnp.minimum(jnp.arange(num_ctas + 1, dtype=jnp.int32) * each, total)

  def owner(at):  # the sequence that item `at` of the line belongs to
    found = (ends[None, :] <= at[:, None]).sum(axis=1, dtype=jnp.int32)
    return jnp.minimum(found, B - 1)

  b = owner(cuts[:-1])
  within = cuts[:-1] - starts[b]
  one = jnp.maximum(items[b], 1)
  sequences = jnp.stack(
    [
      units,
      first,
      low,
      lengths,
      query_starts[:-1],
      query_length,
      owner(ends),
      starts,
      items,
      piece,
    ],
    axis=1,
  )
  starts = jnp.stack(
    [cuts[1:] - cuts[:-1], b, within // one, within % one], axis=1
  )
  shares = jnp.concatenate([starts, sequences[b]], axis=1)
  return Work(
    shares=shares, sequences=sequences, max_pages=max_pages, config=config
  )
