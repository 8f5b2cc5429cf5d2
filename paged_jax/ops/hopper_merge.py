"""Merging the partial results of split segments, by their log-sum-exp.

    w_i = 2^(lse_i - max)      out = sum w_i o_i / (sum w_i + 2^(sink - max))

What a CTA of the decode kernel computed whole is in the output already and is
left alone. Often that is all of it, and what this kernel costs then is starting
its CTAs, 1 us a thousand. So there are few, a number for each cut of the line
of work (hopper_plan.py); the cuts of one segment share its heads:

    line   |    segment 0    |    segment 1    |    segment 2    |
    cuts              |          |          |          |
                     all       half       half        all of its heads

or, if that is less, for each segment. A group of heads is as many as fill the
128 lanes of a CTA. Rows without keys get their zeros here, and tokens that no
sequence owns.

Where so few heads make no 128 lanes a row is widened to 128 columns, and what
is in the columns from H on is cut off.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import backend, hopper_fetch, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs

_LOG2E = math.log2(math.e)
_MANY, _FEW = 16, 4  # partials in flight, while that many are left and then
_TOGETHER = 4  # groups of heads in flight where partials are few


def merge(
  inputs: Inputs,
  work: hopper_plan.Work,
  out: Float[Array, "T N*width"],
  out_lse: Float[Array, "T N"],
  partial: Float[Array, "partials rows width"],
  partial_lse: Float[Array, "partials rows"],
  *,
  interpret: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the output and the natural-log LSE, sinks included."""
  T, N, H = inputs.query.shape
  c = work.config
  sinks = () if inputs.sinks is None else (inputs.sinks,)
  groups = c.heads // hopper_tuning.merged_heads(c.width)
  of_cuts = work.num_ctas, -(-groups // _TOGETHER)
  of_segments = inputs.num_sequences * c.segments, c.block_tokens * groups
  by_cut = c.cut == hopper_tuning.EQUAL
  by_cut &= math.prod(of_cuts) < math.prod(of_segments)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, by_cut, interpret),
    name="paged_decode_merge",
    grid=of_cuts if by_cut else of_segments,
    grid_names=("place", "part"),
    out_shape=(),
    scratch=(),
    num_warpgroups=1,
    interpret=interpret,
  )
  out, out_lse = jax.new_ref(out), jax.new_ref(out_lse)
  kernel(
    partial.reshape(-1, c.rows * c.width),
    partial_lse,
    work.ctas,
    work.sequences,
    *sinks,
    out,
    out_lse,
  )
  out, out_lse = jax.freeze(out), jax.freeze(out_lse)
  return out.reshape(T, N, c.width)[..., :H], out_lse


def _kernel(inputs, c, by_cut, interpret, *refs):
  partial_ref, partial_lse_ref, ctas_ref, sequences_ref, *sinks_ref = refs[:-2]
  place, part = lax.axis_index("place"), lax.axis_index("part")
  places, parts = lax.axis_size("place"), lax.axis_size("part")

  def sequence_of(b):
    return [sequences_ref[b, i] for i in range(hopper_plan.ITEMS + 1)]

  # The plan is older than any kernel that may still run: read it ahead.
  if by_cut:  # an idle CTA's share begins behind all segments, at item 0
    row = [ctas_ref[place, i] for i in range(4 + hopper_plan.ITEMS + 1)]
    _, b, segment, item, *sequence = row
  else:
    b, segment = _divmod(place, c.segments)
    sequence = sequence_of(b)
  items = sequence[hopper_plan.ITEMS]
  begin = sequence[hopper_plan.OFFSET] + segment * items
  count, base = items, begin
  if c.cut == hopper_tuning.EQUAL:
    each = jnp.maximum(ctas_ref[0, 0], 1)
    first_cta = lax.div(begin, each)
    count = lax.div(jnp.maximum(begin + items - 1, 0), each) - first_cta + 1
    base = first_cta + b * c.segments + segment
  split, helper, helpers = count > 1, part, jnp.int32(parts)
  if by_cut:  # no cut is inside the share of a segment's first CTA
    split = item > 0
    helper += (place - first_cta - 1) * parts
    helpers = (count - 1) * parts
  backend.wait_for_previous_kernel(interpret)

  heads = _Heads(
    inputs, c, partial_ref, partial_lse_ref, sinks_ref, *refs[-2:]
  )
  mine = functools.partial(_share, helper=helper, helpers=helpers)
  merge_segment = functools.partial(
    _merge_segment, heads, sequence, segment, mine, base, count
  )
  few = count <= _FEW
  pl.when(split & few)(lambda: merge_segment(few=True))
  pl.when(split & jnp.logical_not(few))(lambda: merge_segment(few=False))
  everywhere = functools.partial(
    _share, helper=place * parts + part, helpers=places * parts
  )
  _write_empty(heads, sequence_of, everywhere)


def _merge_segment(heads, sequence, segment, mine, base, count, *, few):
  """Merges a share of a segment's groups of heads, of its query tokens.

  mine: calls do(i) for what is this CTA's of 0 .. total - 1, mine(total, do).
  base, count: the first of its partials, and how many there are.
  few: whether they are _FEW at most: then some groups are merged at a time.
  """
  c = heads.config
  bundle, block = _divmod(segment, c.row_blocks)
  tokens = sequence[hopper_plan.QUERY_LENGTH] - block * c.block_tokens
  tokens = jnp.clip(tokens, 0, c.block_tokens)
  token = sequence[hopper_plan.QUERY_START] + block * c.block_tokens
  together = _TOGETHER if few else 1
  last = c.heads // heads.number - 1
  pieces = last // together + 1

  def one(i):
    j, piece = _divmod(i, pieces)
    row = hopper_fetch.query_row(heads.inputs, c, token + j, bundle)
    at = j * c.token_rows + hopper_fetch.row_shift(c, row)

    def some(firsts):
      states = [heads.start(bundle * c.heads + first) for first in firsts]
      add = heads.add_few if few else heads.add_all
      states = add(states, [at + first for first in firsts], base, count)
      for first, state in zip(firsts, states, strict=True):
        heads.finish(token + j, bundle * c.heads + first, state)

    groups = [piece * together + i for i in range(together)]
    some([jnp.minimum(group, last) * heads.number for group in groups])
    if c.heads % heads.number:  # the rest, with some heads a second time
      rest = jnp.int32(c.heads - heads.number)
      pl.when(piece == pieces - 1)(lambda: some([rest]))

  mine(tokens * pieces, one)


def _write_empty(heads, sequence_of, share):
  """Writes rows without keys, and tokens that no sequence owns.

  share: calls do(i) for what is this CTA's of 0 .. total - 1, share(total, do).
  """

  def without_keys(b):
    sequence = sequence_of(b)
    start, queries = (
      sequence[i] for i in (hopper_plan.QUERY_START, hopper_plan.QUERY_LENGTH)
    )

    @pl.when(sequence[hopper_plan.ITEMS] == 0)
    def _():
      lax.fori_loop(0, queries, lambda j, _: heads.empty(start + j), None)

  inputs = heads.inputs
  B = inputs.num_sequences
  share(B, without_keys)
  if not inputs.decode:
    last = sequence_of(B - 1)
    used = last[hopper_plan.QUERY_START] + last[hopper_plan.QUERY_LENGTH]
    unowned = inputs.num_tokens - used
    share(unowned, lambda i: heads.empty(used + i, owned=False))


@dataclasses.dataclass(frozen=True)
class _Heads:
  """A group of neighbouring heads of a query token, that fills 128 lanes.

  Its state is (sum of w_i o_i, max, sum of w_i); the latter two by head.
  """

  inputs: Any
  config: hopper_tuning.Config
  partial: Any
  partial_lse: Any
  sinks: Any
  out: Any
  lse: Any

  @property
  def number(self) -> int:
    return hopper_tuning.merged_heads(self.config.width)

  @property
  def _layout(self):
    size = self.number * self.config.width
    vector = 4 if size % 512 == 0 else 2 if size % 256 == 0 else 1
    return mosaic.Layout.WG_STRIDED((size,), vec_size=vector)

  def start(self, first):
    """The state before any partial; `first` is the first one of N heads."""
    f32 = functools.partial(jnp.array, dtype=jnp.float32)
    m = tuple(f32(-jnp.inf) for _ in range(self.number))
    l = tuple(f32(0.0) for _ in range(self.number))
    if self.sinks:
      (sinks,) = self.sinks
      m = tuple(sinks[first + h] * _LOG2E for h in range(self.number))
      l = tuple(jnp.where(x == -jnp.inf, 0.0, 1.0) for x in m)
    return self._spread([0.0] * self.number), m, l

  def add(self, states, at, base, count, start, unroll):
    """Adds partials start .. start + unroll - 1, of `count` from `base` on.

    states: of some groups.
    at: for each, the row of a partial where its first head is.
    """
    width = self.config.width
    size = self.number * width
    loaded = []
    for k in range(unroll):
      part = base + jnp.minimum(start + k, count - 1)
      for row in at:
        lse = [self.partial_lse[part, row + h] for h in range(self.number)]
        lse = [jnp.where(start + k < count, x, -jnp.inf) for x in lse]
        data = self.partial.at[part, pl.ds(row * width, size)]
        loaded.append((lse, mosaic.load(data, layout=self._layout)))
    added = []
    for i, (acc, m, l) in enumerate(states):
      mine = loaded[i :: len(states)]
      most = [
        functools.reduce(jnp.maximum, [lse[h] for lse, _ in mine], m[h])
        for h in range(self.number)
      ]
      shift = [jnp.where(x == -jnp.inf, 0.0, x) for x in most]
      alpha = [jnp.exp2(x - y) for x, y in zip(m, shift, strict=True)]
      acc = acc * self._spread(alpha)
      l = [x * y for x, y in zip(l, alpha, strict=True)]
      for lse, data in mine:
        w = [jnp.exp2(x - y) for x, y in zip(lse, shift, strict=True)]
        acc = acc + data * self._spread(w)
        l = [x + y for x, y in zip(l, w, strict=True)]
      added.append((acc, tuple(most), tuple(l)))
    return added

  def add_few(self, states, at, base, count):
    """Adds all of at most _FEW partials."""
    return self.add(states, at, base, count, 0, _FEW)

  def add_all(self, states, at, base, count):
    """Adds all partials, _MANY at a time, then _FEW."""

    def add(start, unroll, i, states):
      return self.add(states, at, base, count, start + i * unroll, unroll)

    rounds = lax.div(count, jnp.int32(_MANY))
    done = rounds * _MANY
    rest = lax.div(count - done + (_FEW - 1), jnp.int32(_FEW))
    add_most = functools.partial(add, 0, _MANY)
    states = lax.fori_loop(0, rounds, add_most, states)
    return lax.fori_loop(0, rest, functools.partial(add, done, _FEW), states)

  def finish(self, token, first, state):
    """Writes what the group has come to."""
    acc, m, l = state
    inverse = [jnp.where(x == 0.0, 0.0, 1.0 / x) for x in l]
    lse = [
      jnp.where(y == 0.0, -jnp.inf, (x + jnp.log2(y)) / _LOG2E)
      for x, y in zip(m, l, strict=True)
    ]
    out = (acc * self._spread(inverse)).astype(self.inputs.query.dtype)
    width = self.config.width
    self.out[token, pl.ds(first * width, self.number * width)] = out
    for h, value in enumerate(lse):
      self.lse[token, first + h] = value

  def empty(self, token, owned=True):
    """Writes all heads of a token that sees nothing, but sinks if `owned`."""
    N, number = self.inputs.num_heads, self.number

    def group(i, _):
      first = jnp.minimum(i * number, N - number)
      nothing = self if owned else dataclasses.replace(self, sinks=())
      self.finish(token, first, nothing.start(first))

    lax.fori_loop(0, -(-N // number), group, None)

  def _spread(self, values):
    """One scalar a head -> [heads * width]."""
    layout, size = self._layout, self.number * self.config.width
    lane = mosaic.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    spread = jnp.full((size,), values[0], jnp.float32)
    spread = mosaic.layout_cast(spread, layout)
    for i, value in enumerate(values[1:], 1):
      spread = jnp.where(lane >= i * self.config.width, value, spread)
    return spread


def _share(total, do, *, helper, helpers):
  """Calls do(i) for i = helper, helper + helpers, ... below `total`."""
  mine = lax.div(total - helper + helpers - 1, jnp.int32(helpers))
  lax.fori_loop(0, mine, lambda i, _: do(helper + i * helpers), None)


def _divmod(x, y):
  return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))
