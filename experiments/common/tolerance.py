"""How far two results of a model are apart, in tiers, and whether it is right.

    an element mismatches where |a - b| > atol + rtol |b|   (or a, b not finite)

             Tight   Medium   Loose   Very loose
    atol     1e-5    1e-4     1e-3    1e-2
    rtol     1e-4    1e-3     1e-2    1e-1

float32 passes with no mismatch at Medium. Half precision is held against the
same model in float32, by what the dtype itself costs a naive attention (logits,
probabilities and output rounded, softmax in float32):

    max error <= 2 max naive error + 1e-5     mean error <= 1.5 mean naive error

NaN, Inf and another shape are never right.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

TIERS = {
  "Tight": (1e-5, 1e-4),
  "Medium": (1e-4, 1e-3),
  "Loose": (1e-3, 1e-2),
  "Very loose": (1e-2, 1e-1),
}
_NEEDED = "Medium"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """One array of the paged path against the standard one's."""

  name: str
  size: int  # elements
  mismatches: dict[str, int]  # by tier
  max_abs: float
  max_rel: float  # over elements with b != 0
  mean_abs: float
  problem: str  # empty when right

  @property
  def passed(self) -> bool:
    return not self.problem


def compare(
  name: str,
  a: np.ndarray,
  b: np.ndarray,
  *,
  exact: np.ndarray | None = None,
  naive: np.ndarray | None = None,
) -> Comparison:
  """Compares `a`, the paged path's, with `b`, the standard path's.

  Args:
    name: of the comparison.
    a: any shape, float.
    b: the same shape, float.
    exact: the float32 model's, for half precision; None for float32.
    naive: the naive attention's, for half precision; None for float32.

  Returns:
    The comparison; `problem` says what is wrong.
  """
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape:
    return _failed(name, a, f"shape {list(a.shape)} against {list(b.shape)}")
  if not a.size:
    return _failed(name, a, "nothing to compare")
  a, b = a.astype(np.float64), b.astype(np.float64)
  with np.errstate(invalid="ignore"):  # inf - inf
    error = np.abs(a - b)
    mismatches = {
      tier: int((~(error <= atol + rtol * np.abs(b))).sum())
      for tier, (atol, rtol) in TIERS.items()
    }
  nonzero = b != 0
  relative = error[nonzero] / np.abs(b[nonzero])
  stats = dict(
    name=name,
    size=a.size,
    mismatches=mismatches,
    max_abs=float(error.max()),
    max_rel=float(relative.max(initial=0.0)),
    mean_abs=float(error.mean()),
  )
  problem = _not_finite(a, "paged") or _not_finite(b, "standard")
  if not problem:
    if exact is None:
      problem = _too_many(mismatches[_NEEDED], a, b)
    else:
      problem = half_precision(a, exact, naive)
  return Comparison(**stats, problem=problem)


def half_precision(
  out: np.ndarray, exact: np.ndarray, naive: np.ndarray
) -> str:
  """Holds `out` against what rounding costs; returns what is wrong, or ''."""
  out, exact, naive = (x.astype(np.float64) for x in (out, exact, naive))
  if bad := _not_finite(exact, "exact") or _not_finite(naive, "naive"):
    return bad
  mine, theirs = np.abs(out - exact), np.abs(naive - exact)
  limits = 2 * theirs.max() + 1e-5, 1.5 * theirs.mean()
  if mine.max() <= limits[0] and mine.mean() <= limits[1]:
    return ""
  return (
    f"errors against float32: max {mine.max():.3g} (may be {limits[0]:.3g}), "
    f"mean {mine.mean():.3g} (may be {limits[1]:.3g})"
  )


def table(comparisons: Sequence[Comparison]) -> str:
  """Returns the comparisons as text, a line each."""
  head = ("", "elements", *TIERS, "max abs", "max rel", "mean abs", "")
  rows = [head]
  for c in comparisons:
    figures = (c.max_abs, c.max_rel, c.mean_abs)
    counts = [str(c.mismatches.get(tier, "-")) for tier in TIERS]
    rows.append((
      c.name,
      str(c.size),
      *counts,
      *(f"{x:.2e}" for x in figures),
      f"FAIL: {c.problem}" if c.problem else "ok",
    ))
  widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
  return "\n".join(
    "  ".join(
      [row[0].ljust(widths[0])]
      + [x.rjust(n) for x, n in zip(row[1:-1], widths[1:])]
      + [row[-1]]
    ).rstrip()
    for row in rows
  )


def as_dict(comparison: Comparison) -> dict[str, Any]:
  """Returns a JSON object: NaN and Inf become None."""
  values = dataclasses.asdict(comparison)
  for key in ("max_abs", "max_rel", "mean_abs"):
    if not np.isfinite(values[key]):
      values[key] = None
  return values | dict(passed=comparison.passed)


def _failed(name, a, problem):
  return Comparison(
    name=name,
    size=a.size,
    mismatches={},
    max_abs=float("nan"),
    max_rel=float("nan"),
    mean_abs=float("nan"),
    problem=problem,
  )


def _not_finite(x, whose):
  broken = ~np.isfinite(x)
  if not broken.any():
    return ""
  at = np.unravel_index(int(broken.argmax()), x.shape)
  return (
    f"{int(broken.sum())} elements of the {whose} path are NaN or Inf, the "
    f"first at {[int(i) for i in at]}"
  )


def _too_many(count, a, b):
  if not count:
    return ""
  atol, rtol = TIERS[_NEEDED]
  excess = np.abs(a - b) - (atol + rtol * np.abs(b))
  at = np.unravel_index(int(excess.argmax()), a.shape)
  return (
    f"{count} mismatches at {_NEEDED}, the worst at {[int(i) for i in at]}: "
    f"{a[at]:.6g} against {b[at]:.6g}"
  )
