"""Merging the partial results of split segments, by their log-sum-exp.

    w_i = 2^(lse_i - max)      out = sum w_i o_i / (sum w_i + 2^(sink - max))

What a CTA of the decode kernel computed whole is in the output already and is
left alone. The rest: one small CTA for a few neighbouring heads of one query
token (as many as fill its 128 lanes). It finds the partials of the token's
segment from the plan by arithmetic, reads their rows and writes the output row.
Tokens that no sequence owns get 0 and -inf here.

Where so few heads make no 128 lanes a row is widened to 128 columns, and what
is in the columns from H on is cut off.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import backend, hopper_fetch, hopper_plan, hopper_tuning
from paged_jax.ops.backend import mosaic
from paged_jax.ops.inputs import Inputs

_LOG2E = math.log2(math.e)
_UNROLL = (16, 4)  # partials in flight, while that many are left and then


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
  heads = hopper_tuning.merged_heads(c.width)
  chunks = c.heads // heads
  Q = inputs.max_query_length
  blocks = inputs.num_sequences * Q
  if not inputs.decode:
    blocks = max(blocks, T)
  sinks = () if inputs.sinks is None else (inputs.sinks,)
  kernel = backend.mosaic_call(
    functools.partial(_kernel, inputs, c, heads, interpret),
    name="paged_decode_merge",
    grid=(c.bundles * chunks, blocks),
    grid_names=("chunk", "token"),
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


def _kernel(inputs, c, heads, interpret, *refs):
  o_ref, lse_ref, ctas_ref, sequences_ref, *sinks_ref = refs[:-2]
  out_ref, out_lse_ref = refs[-2:]
  H, Q = c.width, inputs.max_query_length
  i32 = functools.partial(jnp.array, dtype=jnp.int32)
  chunks = c.heads // heads
  bundle = lax.div(lax.axis_index("chunk"), i32(chunks))
  chunk = lax.rem(lax.axis_index("chunk"), i32(chunks))
  size = heads * H
  layout = mosaic.Layout.WG_STRIDED((size,), vec_size=_vector(size))
  lane = mosaic.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)

  def spread(values):
    """One scalar a head -> [heads * H]."""
    spread = jnp.full((size,), values[0], jnp.float32)
    spread = mosaic.layout_cast(spread, layout)
    for i, value in enumerate(values[1:], 1):
      spread = jnp.where(lane >= i * H, value, spread)
    return spread

  def store(token, first, out, lse):
    out = out.astype(inputs.query.dtype)
    out_ref[token, pl.ds(first * H, size)] = out
    for i, value in enumerate(lse):
      out_lse_ref[token, first + i] = value

  def each_chunk(do):
    """Calls do(first head of the bundle) for what this CTA merges."""
    do(chunk * heads)
    if c.heads % heads:  # the rest, with some heads a second time
      pl.when(chunk == chunks - 1)(lambda: do(i32(c.heads - heads)))

  x = lax.axis_index("token")
  b, j = lax.div(x, i32(Q)), lax.rem(x, i32(Q))
  B = inputs.num_sequences
  row = jnp.minimum(b, B - 1)
  # Before the wait: the next kernel, which waits for this one, takes its place
  # where the decode kernel has left.
  backend.start_next_kernel(interpret)
  # The plan is older than any kernel that may still run: read it ahead.
  sequence = [sequences_ref[row, i] for i in range(hopper_plan.ITEMS + 1)]
  each = jnp.maximum(ctas_ref[0, 0], 1)
  backend.wait_for_previous_kernel(interpret)

  items = sequence[hopper_plan.ITEMS]
  segment = bundle * c.row_blocks + lax.div(j, i32(c.block_tokens))
  begin = sequence[hopper_plan.OFFSET] + segment * items
  if c.cut == hopper_tuning.EQUAL:
    first_cta = lax.div(begin, each)
    last_cta = lax.div(begin + items - 1, each)
    count = jnp.where(items > 0, last_cta - first_cta + 1, 0)
    base = first_cta + b * c.segments + segment
  else:
    count, base = items, begin

  def merge_heads(head):
    at = lax.rem(j, i32(c.block_tokens)) * c.token_rows
    token = sequence[hopper_plan.QUERY_START] + j
    row = hopper_fetch.query_row(inputs, c, token, bundle)
    at += hopper_fetch.row_shift(c, row) + head
    first = bundle * c.heads + head

    def some(start, unroll, i, carry):
      """Adds partials start + i * unroll and the next ones."""
      acc, m, l = carry
      lses, rows = [], []
      for u in range(unroll):
        k = start + i * unroll + u
        part = base + jnp.minimum(k, count - 1)
        lses.append([
          jnp.where(k < count, lse_ref[part, at + h], -jnp.inf)
          for h in range(heads)
        ])
        rows.append(mosaic.load(o_ref.at[part, pl.ds(at * H, size)],
                                layout=layout))
      m_new = [functools.reduce(jnp.maximum, [x[h] for x in lses], m[h])
               for h in range(heads)]
      safe = [jnp.where(x == -jnp.inf, 0.0, x) for x in m_new]
      alpha = [jnp.exp2(m[h] - safe[h]) for h in range(heads)]
      acc = acc * spread(alpha)
      l = [l[h] * alpha[h] for h in range(heads)]
      for one, data in zip(lses, rows):
        w = [jnp.exp2(one[h] - safe[h]) for h in range(heads)]
        acc = acc + data * spread(w)
        l = [l[h] + w[h] for h in range(heads)]
      return acc, tuple(m_new), tuple(l)

    f32 = functools.partial(jnp.array, dtype=jnp.float32)
    m = tuple(f32(-jnp.inf) for _ in range(heads))
    l = tuple(f32(0.0) for _ in range(heads))
    if sinks_ref:
      m = tuple(sinks_ref[0][first + h] * _LOG2E for h in range(heads))
      l = tuple(jnp.where(x == -jnp.inf, 0.0, 1.0) for x in m)
    many, few = _UNROLL
    rounds = lax.div(count, i32(many))
    done = rounds * many
    rest = lax.div(count - done + (few - 1), i32(few))
    carry = spread([0.0] * heads), m, l
    carry = lax.fori_loop(0, rounds, functools.partial(some, 0, many), carry)
    acc, m, l = lax.fori_loop(
      0, rest, functools.partial(some, done, few), carry
    )
    inverse = [jnp.where(x == 0.0, 0.0, 1.0 / x) for x in l]
    lse = [
      jnp.where(l[h] == 0.0, -jnp.inf, (m[h] + jnp.log2(l[h])) / _LOG2E)
      for h in range(heads)
    ]
    store(token, first, acc * spread(inverse), lse)

  @pl.when((b < B) & (j < sequence[hopper_plan.QUERY_LENGTH]) & (count != 1))
  def _():
    each_chunk(merge_heads)

  if not inputs.decode:
    last = [sequences_ref[B - 1, i] for i in range(8)]
    used = last[hopper_plan.QUERY_START] + last[hopper_plan.QUERY_LENGTH]
    zeros, dead = spread([0.0] * heads), [jnp.float32(-jnp.inf)] * heads

    @pl.when((x >= used) & (x < inputs.num_tokens))
    def _():
      each_chunk(lambda head: store(x, bundle * c.heads + head, zeros, dead))


def _vector(size):
  return 4 if size % 512 == 0 else 2 if size % 256 == 0 else 1
