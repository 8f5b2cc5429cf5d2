"""Is an output right? Only the reference says so, and NaN is never right.

    float32            |a - b| <= 2e-6 + 1e-5 |b|              every element
    float16, bfloat16  max |a - b|  <= 2   max  |n - b| + 1e-5
                       mean |a - b| <= 1.5 mean |n - b|

b is the reference in higher precision: float64 on a CPU, float32 without TF32
on a GPU. n is a naive attention with logits, probabilities and output rounded
to the dtype and the softmax in float32: what the dtype itself costs.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from experiments.common import shapes
from paged_jax.ops import inputs as inputs_lib
from paged_jax.ops import reference

ATOL, RTOL = 2e-6, 1e-5
_QUERY_BLOCK = 128  # rows of the naive attention at once


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
    problem: what is wrong; empty when the output is right.
  """

  max_error: float = float("nan")
  mean_error: float = float("nan")
  max_bound: float = float("nan")
  mean_bound: float = float("nan")
  of_bound: float = float("nan")
  problem: str = ""

  @property
  def passed(self) -> bool:
    return not self.problem


def precise_dtype() -> str:
  """float64 on a CPU; float32 on a GPU, where float64 would take minutes."""
  return "float64" if jax.default_backend() == "cpu" else "float32"


def exact(shape: shapes.Shape, dtype: str) -> Callable[[Any, Array], Array]:
  """Returns the jitted reference, (state, query) -> output in `dtype`.

  Trace and call it under `precision(dtype)`.
  """

  def program(state, query):
    inputs = inputs_lib.normalise(
      query,
      state["k_pages"],
      state["v_pages"],
      state["page_table"],
      state["lengths"],
      query_starts=state["query_starts"],
      max_query_length=int(shape.query_lengths.max()),
      layer=0,
      window=shape.window,
      soft_cap=shape.soft_cap,
      sinks=state["sinks"],
    )
    # The dtype of the query decides the precision of everything after it.
    inputs = dataclasses.replace(inputs, query=query.astype(dtype))
    return reference.attend(inputs)[0]

  return jax.jit(program)


def precision(dtype: str):
  """Returns the context in which `exact` of `dtype` lives."""
  return jax.enable_x64(dtype == "float64")


def naive(shape: shapes.Shape) -> Callable[..., Array]:
  """Returns the jitted naive attention, (query, k, v, sinks) -> output.

  k and v are packed tokens [S, K, H]: no pages, nothing to get wrong.
  """
  longest, dtype = int(shape.lengths.max()), shape.dtype
  K, G, H = shape.num_kv_heads, shape.group_size, shape.head_dim
  kv_starts = shape.lengths.cumsum() - shape.lengths
  block = min(_QUERY_BLOCK, int(shape.query_lengths.max()))
  tasks = np.array([
    (shape.query_starts[b] + i, kv_starts[b], n, n - shape.query_lengths[b] + i)
    for b, n in enumerate(shape.lengths)
    for i in range(0, shape.query_lengths[b], block)
  ], np.int32)
  # Where a packed query lies among the blocks.
  home = np.concatenate([np.arange(n) for n in shape.query_lengths])
  sizes = -(-shape.query_lengths // block)
  first = np.repeat(sizes.cumsum() - sizes, shape.query_lengths)
  home = (first + home // block) * block + home % block

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
  want: Float[Array, "T N H"],
  rounded: Float[Array, "T N H"] | None,
  shape: shapes.Shape,
) -> Verdict:
  """Holds an output against the reference.

  Args:
    out: what the implementation returned.
    want: what `exact` returned.
    rounded: what `naive` returned; None for float32.
    shape: the call.

  Returns:
    The verdict; `problem` says what is wrong.
  """
  try:
    chex.assert_shape(out, want.shape)
    chex.assert_type(out, shapes.numpy_dtype(shape.dtype))
  except AssertionError as error:
    return Verdict(problem=f"shape or dtype: {_one_line(error)}")
  with precision(str(want.dtype)):
    stats = jax.device_get(_compare(out, want))
  if stats["nonfinite"]:
    at = np.unravel_index(int(stats["first"]), want.shape)
    return Verdict(
      problem=f"{int(stats['nonfinite'])} elements are NaN or Inf, the first "
      f"at [{', '.join(map(str, map(int, at)))}]"
    )
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
    problem=problem,
  )


@functools.partial(jax.jit)
def _compare(out, want):
  error = jnp.abs(out.astype(want.dtype) - want).ravel()
  bound = (ATOL + RTOL * jnp.abs(want)).ravel()
  ratio = error / bound
  worst = jnp.argmax(ratio)
  broken = ~jnp.isfinite(out).ravel()
  return dict(
    max=error.max(),
    mean=error.mean(),
    worst=ratio[worst],
    bound_at_worst=bound[worst],
    mean_bound=bound.mean(),
    nonfinite=broken.sum(),
    first=jnp.argmax(broken),
  )


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())
