"""Weights of logits relative to a maximum, and their sums in parts.

    weights = 2^(s - m)

where m follows the largest s so far, or with some slack: where it stays, what
was added up before is left alone. A row's m depends on no other row. The sum is
kept in 8 parts, so that the 4 threads of a row, 2 columns each, do not meet for
it.

Without slack the largest weight is 1, which is exact in half precision, so that
a key that outweighs all others gives its own value. With slack it is rounded,
and is 2^-9 of it off.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops.backend import mosaic

PARTS = 8  # of a row's denominator: 4 threads, 2 columns each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Base-2 logits of a unit, float32 [rows, width], when times `factor`."""

  logits: Any
  factor: float
  m: Any  # what weights are relative to, [rows], -inf before something is seen
  shift: Any  # m, or 0 where nothing was seen
  alpha: Any  # factor of the weights of units before

  def weights(self, first: int, last: int) -> Any:
    """Returns those of columns first .. last - 1."""
    logits = self.logits[:, first:last] * self.factor
    return jnp.exp2(logits - backend.across(self.shift, last - first))


def start(rows: int, head_dim: int) -> tuple[Any, Any, Any]:
  """The state of rows that have seen nothing: [64, H], [rows], [rows, PARTS].

  rows: 64, or 32 that are packed.
  """

  def full(shape, value, layout):
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  layout = backend.in_registers(rows)
  return (
    full((64, head_dim), 0.0, backend.in_registers(64)),
    full((rows,), -jnp.inf, layout.reduce(1)),
    full((rows, PARTS), 0.0, layout),
  )


def score(logits: Any, factor: float, m: Any, masked: bool, slack: float = 0.0):
  """Returns the scores of a unit; `masked`: whether some may be -inf."""
  most = logits.max(axis=1) * factor
  if slack:
    m_new = shift = jnp.where(most > m + slack, most, m)
  else:
    m_new = shift = jnp.maximum(most, m)
  if masked:
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  return Scores(
    logits=logits, factor=factor, m=m_new, shift=shift, alpha=alpha
  )


def sums(p):
  """Sums of each row's columns, [rows, PARTS]."""
  return functools.reduce(  # sum() would begin by adding to 0
    operator.add,
    [p[:, i : i + PARTS] for i in range(0, p.shape[1], PARTS)],
  )
