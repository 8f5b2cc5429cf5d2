"""How the Hopper prefill kernel's online softmax ends: sinks, output, LSE.

A row's state is its accumulator, what its weights are relative to, m, and the
sum of them in parts (hopper_scores.py).
"""

from typing import Any

import jax.numpy as jnp

from paged_jax.ops import backend
from paged_jax.ops import hopper_prefill_plan as plan
from paged_jax.ops.hopper_state import LOG2E


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
