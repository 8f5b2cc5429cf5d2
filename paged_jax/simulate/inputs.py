"""Standard-normal inputs of a case in a paged pool, and their golden output."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from paged_jax.simulate import cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Host arrays of one decode step.

  Attributes:
    query: one token a sequence.
    k_pages: pool of keys; slots no sequence owns hold NaN.
    v_pages: pool of values; slots no sequence owns hold NaN.
    page_table: entries beyond a sequence's pages are P, the null page.
    lengths: tokens each sequence attends to.
  """

  query: Float[np.ndarray, "B N H"]
  k_pages: Float[np.ndarray, "P K p H"]
  v_pages: Float[np.ndarray, "P K p H"]
  page_table: Int[np.ndarray, "B M"]
  lengths: Int[np.ndarray, "B"]

  @property
  def block(self) -> int:
    return self.k_pages.shape[2]


def make_inputs(case: cases.Case, seed: int = 0) -> Inputs:
  """Draws queries, keys and values of a case, pages scattered over the pool.

  Args:
    case: the shape.
    seed: of the random generator; any int >= 0.

  Returns:
    Inputs in `case.dtype`. The pool has three pages more than are in use, and
    every dead slot is NaN, so that a read past a sequence cannot pass unseen.
  """
  rng = np.random.default_rng(seed)
  dtype = jnp.dtype(case.dtype)
  pages = case.pages_per_sequence
  pool = sum(pages) + 3
  shape = (pool, case.kv_heads, case.block, case.head_dim)

  table = np.full((case.batch, case.table_width), pool, np.int32)
  ids = rng.permutation(pool).astype(np.int32)
  live = np.zeros((pool, case.block), bool)
  start = 0
  for row, (count, length) in enumerate(zip(pages, case.lengths)):
    mine = ids[start : start + count]
    table[row, :count] = mine
    live[mine] = (np.arange(count * case.block) < length).reshape(
      count, case.block
    )
    start += count

  def draw():
    x = rng.standard_normal(shape, np.float32).astype(dtype)
    np.moveaxis(x, 2, 1)[~live] = np.nan
    return x

  query = rng.standard_normal(
    (case.batch, case.query_heads, case.head_dim), np.float32
  )
  return Inputs(
    query=query.astype(dtype),
    k_pages=draw(),
    v_pages=draw(),
    page_table=table,
    lengths=np.asarray(case.lengths, np.int32),
  )


def golden(inputs: Inputs, group: int = 1) -> Float[np.ndarray, "B N H"]:
  """Attention in float64 with the probabilities rounded to the input dtype.

  For each group of blocks with logits s and maximum m,

      P = round(exp(s - m)),   l = sum(P),   o = P V,

  and the groups are combined by their maxima. P is rounded against the maximum
  of its own group, as a chip must that has not seen the other groups yet, so
  the result depends on `group` in half precision.

  Args:
    inputs: of one case.
    group: blocks a softmax task handles at once, at least 1.

  Returns:
    Output, float64; exactly 0 for a sequence of length 0.
  """
  batch, heads, head_dim = inputs.query.shape
  kv_heads = inputs.k_pages.shape[1]
  dtype = inputs.query.dtype
  span = group * inputs.block
  out = np.zeros((batch, heads, head_dim))
  for row, length in enumerate(inputs.lengths.tolist()):
    pages = inputs.page_table[row, : -(-length // inputs.block)]
    # [n, K, p, H] -> [K, n * p, H], then the live tokens only.
    k, v = (
      np.moveaxis(pool[pages], 1, 0)
      .reshape(kv_heads, -1, head_dim)[:, :length]
      .astype(np.float64)
      for pool in (inputs.k_pages, inputs.v_pages)
    )
    q = inputs.query[row].astype(np.float64).reshape(kv_heads, -1, head_dim)
    maxima, sums, outs = [], [], []
    for first in range(0, length, span):
      part = slice(first, first + span)
      s = np.einsum("kgh,kth->kgt", q, k[:, part]) * head_dim**-0.5
      m = s.max(-1, keepdims=True)
      p = np.exp(s - m).astype(dtype).astype(np.float64)
      maxima.append(m)
      sums.append(p.sum(-1, keepdims=True))
      outs.append(np.einsum("kgt,kth->kgh", p, v[:, part]))
    if not maxima:
      continue
    weights = np.exp(np.stack(maxima) - np.max(maxima, axis=0))
    total = (weights * np.stack(outs)).sum(0)
    total /= (weights * np.stack(sums)).sum(0)
    out[row] = total.reshape(heads, head_dim)
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """How many elements of an output agree with the golden.

  Attributes:
    matched: elements with |a - b| <= atol + rtol * |b|.
    total: elements of the golden.
    max_abs: largest |a - b|; not finite when one is not.
    problem: what is wrong, empty when everything matches.
  """

  matched: int
  total: int
  max_abs: float
  problem: str = ""

  @property
  def passed(self) -> bool:
    return not self.problem

  def __str__(self) -> str:
    word = "PASS" if self.passed else "FAIL"
    tail = f"; {self.problem}" if self.problem else ""
    return f"{word} ({self.matched}/{self.total} elements matched{tail})"


def compare(
  out: Float[np.ndarray, "..."],
  want: Float[np.ndarray, "..."],
  *,
  atol: float,
  rtol: float,
) -> Comparison:
  """Counts the elements of `out` within tolerance of `want`.

  Args:
    out: any float dtype. NaN and Inf never match.
    want: the golden.
    atol: absolute tolerance, >= 0.
    rtol: relative tolerance, >= 0.

  Returns:
    The count and, on failure, the worst element.
  """
  want = np.asarray(want, np.float64)
  if out.shape != want.shape:
    return Comparison(
      matched=0,
      total=want.size,
      max_abs=float("nan"),
      problem=f"shape {out.shape}, expected {want.shape}",
    )
  if not want.size:
    return Comparison(matched=0, total=0, max_abs=0.0)
  out = np.asarray(out, np.float64)
  error = np.abs(out - want)
  bound = atol + rtol * np.abs(want)
  # NaN and Inf never match, not even an Inf golden, whose bound is Inf too.
  match = np.isfinite(error) & (error <= bound)
  problem = ""
  if not match.all():
    excess = np.where(np.isfinite(error), error, np.inf)
    excess -= np.where(np.isfinite(bound), bound, 0)
    at = np.unravel_index(int(excess.argmax()), out.shape)
    where = ", ".join(map(str, map(int, at)))
    problem = (
      f"worst [{where}]: got {out[at]:.6g}, want {want[at]:.6g}, "
      f"off by {error[at]:.3g}, allowed {bound[at]:.3g}"
    )
  return Comparison(
    matched=int(match.sum()),
    total=want.size,
    max_abs=float(error.max()),
    problem=problem,
  )
