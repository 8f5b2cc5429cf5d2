"""Is an output right? Only the reference says so, and NaN is never right.

    float32            |a - b| <= 2e-6 + 1e-5 |b|              every element
    float16, bfloat16  max |a - b|  <= 2   max  |n - b| + 1e-5
                       mean |a - b| <= 1.5 mean |n - b|

b is the reference in higher precision: float64 on a CPU, float32 without TF32
on a GPU. n is a naive attention with logits, probabilities and output rounded
to the dtype and the softmax in float32: what the dtype itself costs.

Long prompts are held against b in blocks of neighbouring tokens, the first, the
last and others by chance; that all is finite is asked of every element.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from experiments.common import shapes
from paged_jax.ops import inputs as inputs_lib
from paged_jax.ops import reference

ATOL, RTOL = 2e-6, 1e-5
_QUERY_BLOCK = 128  # rows of the naive attention at once
_MOST_BLOCKS = 32  # of more than one token, that are checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """How far an output is from the reference, and how far it may be.

  Attributes:
    max_error: largest |a - b|.
    mean_error: mean |a - b|.
    max_bound: what max_error may reach (float32: at the worst element).
    mean_bound: what mean_error may reach (float32: mean of the bounds).
    of_bound: the part of the bound used up, 0..1 where right; the worst
      element's (float32) or the worse of max and mean (half precision).
    checked_tokens: tokens held against the reference.
    problem: what is wrong; empty when the output is right.
  """

  max_error: float = float("nan")
  mean_error: float = float("nan")
  max_bound: float = float("nan")
  mean_bound: float = float("nan")
  of_bound: float = float("nan")
  checked_tokens: int = 0
  problem: str = ""

  @property
  def passed(self) -> bool:
    return not self.problem


def precise_dtype() -> str:
  """float64 on a CPU; float32 on a GPU, where float64 would take minutes."""
  return "float64" if jax.default_backend() == "cpu" else "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """What is checked: C blocks of query tokens, each of one sequence.

  Attributes:
    rows: the sequence.
    starts: the first token's row among the packed queries.
    counts: query tokens.
    lengths: KV tokens up to the last one's own.
  """

  rows: Int[np.ndarray, "C"]
  starts: Int[np.ndarray, "C"]
  counts: Int[np.ndarray, "C"]
  lengths: Int[np.ndarray, "C"]

  @functools.cached_property
  def tokens(self) -> Int[np.ndarray, "t"]:
    """Packed query rows of all blocks."""
    return np.concatenate([
      np.arange(start, start + count)
      for start, count in zip(self.starts, self.counts)
    ])


@functools.cache
def blocks(shape: shapes.Shape) -> Blocks:
  """Returns what `exact`, `naive` and `check` look at: all, if that is little.
  """
  size = min(_QUERY_BLOCK, int(shape.query_lengths.max()))
  every = np.array([
    (b, shape.query_starts[b] + i, min(size, new - i),
     min(n - new + i + size, n))
    for b, (n, new) in enumerate(zip(shape.lengths, shape.query_lengths))
    for i in range(0, new, size)
  ])
  if size > 1 and len(every) > _MOST_BLOCKS:
    rng = np.random.default_rng(shape.seed)
    some = rng.choice(
      np.arange(1, len(every) - 1), _MOST_BLOCKS - 2, replace=False
    )
    every = every[[0, *sorted(some), len(every) - 1]]
  rows, starts, counts, lengths = every.T.astype(np.int32)
  return Blocks(rows=rows, starts=starts, counts=counts, lengths=lengths)


def exact(shape: shapes.Shape, dtype: str) -> Callable[[Any, Array], Array]:
  """Returns the jitted reference, (state, query) -> output in `dtype`.

  Of the tokens of `blocks(shape)`; a block is a chunk of its sequence. Trace
  and call it under `precision(dtype)`.
  """
  some = blocks(shape)
  starts = np.concatenate([[0], some.counts.cumsum()]).astype(np.int32)

  def program(state, query):
    inputs = inputs_lib.normalise(
      query[some.tokens],
      state["k_pages"],
      state["v_pages"],
      state["page_table"][some.rows],
      jnp.asarray(some.lengths),
      query_starts=jnp.asarray(starts),
      max_query_length=int(some.counts.max()),
      layer=0,
      window=shape.window,
      soft_cap=shape.soft_cap,
      sinks=state["sinks"],
    )
    # The dtype of the query decides the precision of everything after it.
    inputs = dataclasses.replace(inputs, query=inputs.query.astype(dtype))
    return reference.attend(inputs)[0]

  return jax.jit(program)


def precision(dtype: str):
  """Returns the context in which `exact` of `dtype` lives."""
  return jax.enable_x64(dtype == "float64")


def naive(shape: shapes.Shape) -> Callable[..., Array]:
  """Returns the jitted naive attention, (query, k, v, sinks) -> output.

  Of the tokens of `blocks(shape)`. k and v are packed tokens [S, K, H]: no
  pages, nothing to get wrong.
  """
  longest, dtype = int(shape.lengths.max()), shape.dtype
  K, G, H = shape.num_kv_heads, shape.group_size, shape.head_dim
  kv_starts = shape.lengths.cumsum() - shape.lengths
  some = blocks(shape)
  block = int(some.counts.max())
  tasks = np.stack([
    some.starts, kv_starts[some.rows], some.lengths, some.lengths - some.counts
  ], axis=1).astype(np.int32)
  # Where a token lies among the blocks' outputs.
  home = np.concatenate([
    i * block + np.arange(count) for i, count in enumerate(some.counts)
  ])

  def program(query, k, v, sinks):
    query = jnp.pad(query, ((0, block), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, longest), (0, 0), (0, 0))) for x in (k, v))
    sink = jnp.full(K * G, -jnp.inf) if sinks is None else sinks
    sink = sink.reshape(K, G, 1, 1)

    def one(task):
      q = lax.dynamic_slice_in_dim(query, task[0], block)
      q = q.reshape(block, K, G, H)
      keys, values = (
        lax.dynamic_slice_in_dim(x, task[1], longest) for x in (k, v)
      )
      logits = jnp.einsum("tkgh,skh->kgts", q, keys) * jnp.asarray(
        H**-0.5, dtype
      )
      if shape.soft_cap is not None:
        cap = jnp.asarray(shape.soft_cap, dtype)
        logits = cap * jnp.tanh(logits / cap)
      at = task[3] + jnp.arange(block)[:, None]
      position = jnp.arange(longest)
      seen = (position < task[2]) & (position <= at)
      if shape.window is not None:
        seen &= position > at - shape.window
      logits = jnp.where(seen, logits.astype(jnp.float32), -jnp.inf)
      m = jnp.maximum(logits.max(-1, keepdims=True), sink)
      m = jnp.where(jnp.isneginf(m), 0, m)
      p = jnp.exp(logits - m)
      total = p.sum(-1, keepdims=True) + jnp.exp(sink - m)
      p = (p / jnp.where(total == 0, 1, total)).astype(dtype)
      out = jnp.einsum("kgts,skh->tkgh", p, values)
      return out.reshape(block, K * G, H)

    out = lax.map(one, jnp.asarray(tasks))
    return out.reshape(-1, K * G, H)[home]

  return jax.jit(program)


def check(
  out: Float[Array, "T N H"],
  want: Float[Array, "t N H"],
  rounded: Float[Array, "t N H"] | None,
  shape: shapes.Shape,
) -> Verdict:
  """Holds an output against the reference.

  Args:
    out: what the implementation returned.
    want: what `exact` returned: t of the T tokens, see `blocks`.
    rounded: what `naive` returned; None for float32.
    shape: the call.

  Returns:
    The verdict; `problem` says what is wrong.
  """
  try:
    chex.assert_shape(out, (shape.num_tokens, *want.shape[1:]))
    chex.assert_type(out, shapes.numpy_dtype(shape.dtype))
  except AssertionError as error:
    return Verdict(problem=f"shape or dtype: {_one_line(error)}")
  broken, first = map(int, jax.device_get(_broken(out)))
  if broken:
    at = np.unravel_index(first, out.shape)
    return Verdict(
      problem=f"{broken} elements are NaN or Inf, the first at "
      f"[{', '.join(map(str, map(int, at)))}]"
    )
  tokens = blocks(shape).tokens
  if len(tokens) < shape.num_tokens:
    out = out[tokens]
  with precision(str(want.dtype)):
    stats = jax.device_get(_compare(out, want))
  if rounded is None:
    bounds = stats["bound_at_worst"], stats["mean_bound"]
    of_bound = stats["worst"]
  else:
    with precision(str(want.dtype)):
      theirs = jax.device_get(_compare(rounded, want))
    bounds = 2 * theirs["max"] + 1e-5, 1.5 * theirs["mean"]
    of_bound = np.maximum(
      stats["max"] / bounds[0], stats["mean"] / bounds[1]
    )
  max_error, mean_error = float(stats["max"]), float(stats["mean"])
  max_bound, mean_bound = map(float, bounds)
  problem = ""
  if not of_bound <= 1:  # so NaN fails too
    problem = (
      f"max error {max_error:.3g} (bound {max_bound:.3g}), mean error "
      f"{mean_error:.3g} (bound {mean_bound:.3g}): {float(of_bound):.3g} times "
      "what is allowed"
    )
  return Verdict(
    max_error=max_error,
    mean_error=mean_error,
    max_bound=max_bound,
    mean_bound=mean_bound,
    of_bound=float(of_bound),
    checked_tokens=len(tokens),
    problem=problem,
  )


@jax.jit
def _broken(out):
  """Returns (NaN and Inf in it, index of the first one)."""
  broken = ~jnp.isfinite(out).ravel()
  return broken.sum(), jnp.argmax(broken)


@jax.jit
def _compare(out, want):
  error = jnp.abs(out.astype(want.dtype) - want).ravel()
  bound = (ATOL + RTOL * jnp.abs(want)).ravel()
  ratio = error / bound
  worst = jnp.argmax(ratio)
  return dict(
    max=error.max(),
    mean=error.mean(),
    worst=ratio[worst],
    bound_at_worst=bound[worst],
    mean_bound=bound.mean(),
  )


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())
