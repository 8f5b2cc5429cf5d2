"""The plan of a Hopper decode step: equal work for every CTA.

All work is one line of units (a page of one bundle of heads, what one copy
brings): sequence after sequence, in a sequence segment after segment (one
bundle of kv heads and one block of query rows), in a segment page after page.
CTA c takes the c-th equal share of the line, wherever its ends fall:

    line    | b=0, s=0 | b=0, s=1 | b=1, s=0        | b=1, s=1        |
    CTAs    |   0   |   1   |   2   |   3   |   4   |   5   |   6   |

so a ragged batch costs what an even one of the same sum does. A segment that
crosses CTAs leaves one partial result in each; since both c and the global
segment index s only grow along the line, c + s names every partial uniquely and
a segment's partials follow each other.

Two other ways of cutting hand out whole pieces, a line of them instead of
units, equally many to every CTA:

    FIXED   a segment is cut every so many units, by its own length alone, so
            that its result does not depend on the rest of the batch; the
            partial of a piece is named by the piece's place in the line
    WHOLE   a piece is a segment, whose result needs no merging

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
  piece. A row of `ctas`: number of items; the first one's sequence, segment
  and place in the segment; and the row of that sequence, so that a CTA starts
  after one read. `tables`: those to read in place of the call's, K's and V's if
  it has its own, or none.
  """

  ctas: Int[Array, "ctas 14"]
  sequences: Int[Array, "B 10"]
  tables: tuple[Int[Array, "B M"], ...] = ()
  max_pages: int = dataclasses.field(metadata=dict(static=True))  # M
  config: hopper_tuning.Config = dataclasses.field(metadata=dict(static=True))

  @property
  def num_ctas(self) -> int:
    return self.ctas.shape[0]

  @property
  def num_partials(self) -> int:
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
  units = jnp.maximum(-(-lengths // step) - first, 0)
  units = jnp.where(query_length > 0, units, 0)
  items, piece = units, jnp.ones_like(units)
  if config.cut == hopper_tuning.WHOLE:  # an empty row too gets its zeros
    items, piece = jnp.ones_like(units), jnp.maximum(units, 1)
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
  shares = jnp.stack(
    [cuts[1:] - cuts[:-1], b, within // one, within % one], axis=1
  )
  ctas = jnp.concatenate([shares, sequences[b]], axis=1)
  return Work(
    ctas=ctas, sequences=sequences, max_pages=max_pages, config=config
  )
