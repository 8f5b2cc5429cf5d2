"""The state of online softmax, and sums of states.

    acc = sum_j 2^(s_j - m) v_j        l = sum_j 2^(s_j - m)

for each query row, over keys j that were seen; s_j: logits in units of log2; m:
at first the largest of them. A settled state has a whole number as m. States of
different keys are added at a common m, and where they are settled scaling them
to it is exact, for it multiplies by powers of two. So the sum of many, in a
given order, has the same bits however many of them are added at a time, and
wherever (but for what is 2^126 times smaller than the rest, and is lost).
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp

from paged_jax.ops import backend

LOG2E = math.log2(math.e)

Across = Callable[[Any, Any], Any]


class State(NamedTuple):
  """A state of some rows; m and l are numbers of theirs."""

  acc: Any  # float32
  m: Any  # float32; -inf where nothing was seen
  l: Any  # float32


def across(x: Any, acc: Any) -> Any:
  """Returns numbers of rows, [rows], in all columns of acc, [rows, columns]."""
  return backend.across(x, acc.shape[1])


def settle(state: State) -> State:
  """Returns the state at the whole number next to its maximum."""
  m = jnp.where(state.m == -jnp.inf, 0.0, state.m)
  whole = lax.round(m, lax.RoundingMethod.TO_NEAREST_EVEN)
  state = _scale(state, jnp.exp2(m - whole), across)
  return state._replace(m=jnp.where(state.m == -jnp.inf, -jnp.inf, whole))


def join(first: State, *others: State, across: Across = across) -> State:
  """Returns the sum of settled states, added one after the other.

  across: what `across` is for other layouts, here and below.
  """
  top = first.m
  for state in others:
    top = jnp.maximum(top, state.m)
  shift = jnp.where(top == -jnp.inf, 0.0, top)
  acc, _, l = _scale(first, jnp.exp2(first.m - shift), across)
  for state in others:
    more = _scale(state, jnp.exp2(state.m - shift), across)
    acc, l = acc + more.acc, l + more.l
  return State(acc, top, l)


def add_sink(state: State, sink: Any, across: Across = across) -> State:
  """Adds logits without values, one a row; natural, not in units of log2."""
  sink = sink * LOG2E
  top = jnp.maximum(state.m, sink)
  shift = jnp.where(top == -jnp.inf, 0.0, top)
  acc, _, l = _scale(state, jnp.exp2(state.m - shift), across)
  return State(acc, top, l + jnp.exp2(sink - shift))


def normalise(state: State, across: Across = across) -> tuple[Any, Any]:
  """Returns acc / l and the natural-log LSE; 0, -inf where nothing was seen."""
  acc, m, l = state
  out = acc * across(1.0 / jnp.where(l == 0.0, 1.0, l), acc)
  return out, jnp.where(l == 0.0, -jnp.inf, (m + jnp.log2(l)) * (1 / LOG2E))


def _scale(state, by, across):
  return State(state.acc * across(by, state.acc), state.m, state.l * by)
