"""The arithmetic of the Hopper prefill kernel's online softmax.

A row's state is its accumulator, what its weights are relative to, m, and the
sum of them in PARTS parts. m follows the maximum with some slack, so that a
weight may reach 2^8: where it stays, the accumulator is left alone. A row's m
depends on no other row. The sum is kept in 8 parts, so that the 4 threads of a
row, 2 columns each, do not meet for it.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.backend import mosaic
from paged_jax.ops.hopper_state import LOG2E

PARTS = 8  # of a row's denominator: 4 threads, 2 columns each
_SLACK = 8.0  # see above; 2^8 is far from what float16 overflows at


def start(head_dim: int) -> tuple[Any, Any, Any]:
  """The state of rows that have seen nothing: [64, H], [64], [64, PARTS]."""

  def full(shape, value, layout):
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)

  layout = mosaic.Layout.WGMMA
  return (
    full((64, head_dim), 0.0, layout),
    full((64,), -jnp.inf, layout.reduce(1)),
    full((64, PARTS), 0.0, layout),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Base-2 logits of a unit, float32 [64, width], when times `factor`."""

  logits: Any
  factor: float
  m: Any  # what weights are relative to, [64], -inf before something is seen
  shift: Any  # m, or 0 where nothing was seen
  alpha: Any  # factor of the weights of units before

  def weights(self, first: int, last: int) -> Any:
    """Returns those of columns first .. last - 1."""
    logits = self.logits[:, first:last] * self.factor
    return jnp.exp2(logits - backend.across(self.shift, last - first))


def score(logits, factor, m, masked):
  """Returns the scores of a unit; `masked`: whether some may be -inf."""
  most = logits.max(axis=1) * factor
  m_new = shift = jnp.where(most > m + _SLACK, most, m)
  if masked:
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  return Scores(
    logits=logits, factor=factor, m=m_new, shift=shift, alpha=alpha
  )


def sums(p):
  """Sums of each row's columns, [64, PARTS]."""
  return functools.reduce(  # sum() would begin by adding to 0
    operator.add,
    [p[:, i : i + PARTS] for i in range(0, p.shape[1], PARTS)],
  )


def add_sinks(inputs, c, tile, kv_head, head, sinks_ref, acc, m, l):
  """Adds each head's sink to its rows' denominators, as a logit without V."""
  G = inputs.group_size
  most = max(heads for _, heads in c.kinds)
  sink = jnp.zeros_like(m)
  _, first_head, _ = plan.unpack(tile[plan.ROWS])
  for j in range(most):
    which = jnp.minimum(first_head + j, G - 1)
    value = sinks_ref[kv_head * G + which] * LOG2E
    sink = jnp.where(head == j, value, sink)
  # Tokens that no sequence owns have no denominator.
  sink = jnp.where(tile[plan.LENGTH] < 0, -jnp.inf, sink)
  m_new = jnp.maximum(m, sink)
  shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
  alpha = jnp.exp2(m - shift)
  l = l * alpha + jnp.exp2(sink - shift)
  return acc * backend.across(alpha, inputs.head_dim), m_new, l


def normalise(acc: Any, m: Any, l: Any) -> tuple[Any, Any]:
  """Returns the output and the natural-log LSE; l: [64], a sum of the parts."""
  lse = jnp.where(l == 0.0, -jnp.inf, m * (1 / LOG2E) + jnp.log(l))
  inverse = 1.0 / jnp.where(l == 0.0, 1.0, l)
  return acc * backend.across(inverse, acc.shape[1]), lse
