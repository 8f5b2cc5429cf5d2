"""Sums of softmax states: right, and the same bits however they are made."""

import functools

import jax.numpy as jnp
import numpy as np

from paged_jax.ops import hopper_state
from tests.conformance import data


def test_a_sum_is_the_softmax_of_all_keys():
  logits, v = _keys(7)
  out, lse = hopper_state.normalise(
    hopper_state.join(*map(hopper_state.settle, _states(logits, v)))
  )
  s = np.concatenate(logits, axis=1).astype(np.float64) * np.log(2)
  top = s.max(axis=1, keepdims=True)
  p = np.exp(s - top)
  want = p @ np.concatenate(v).astype(np.float64) / p.sum(axis=1)[:, None]
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, top[:, 0] + np.log(p.sum(axis=1)), rtol=1e-6)


def test_a_sum_has_the_same_bits_however_it_is_made():
  for seed in range(20):
    states = [hopper_state.settle(x) for x in _states(*_keys(seed))]
    at_once = hopper_state.join(*states)
    one_by_one = functools.reduce(hopper_state.join, states)
    some = hopper_state.join(hopper_state.join(*states[:3]), *states[3:])
    for other in (one_by_one, some):
      data.assert_same_bits(other, at_once)


def test_what_saw_nothing_changes_nothing():
  state = hopper_state.settle(_states(*_keys(1))[0])
  empty = hopper_state.settle(hopper_state.State(
    jnp.zeros_like(state.acc), jnp.full_like(state.m, -jnp.inf),
    jnp.zeros_like(state.l),
  ))
  for joined in (
    hopper_state.join(state, empty), hopper_state.join(empty, state)
  ):
    data.assert_same_bits(joined, state)
  out, lse = hopper_state.normalise(hopper_state.join(empty, empty))
  assert (out == 0).all() and (lse == -jnp.inf).all()


def test_a_sink_is_a_logit_without_a_value():
  logits, v = _keys(2)
  sink = np.float32([3.0, -np.inf])
  state = hopper_state.settle(_states(logits, v)[0])
  out, lse = hopper_state.normalise(hopper_state.add_sink(state, sink))
  plain, plain_lse = hopper_state.normalise(state)
  grown = np.logaddexp(np.asarray(plain_lse, np.float64), sink)
  np.testing.assert_allclose(lse, grown, rtol=1e-6)
  want = plain * np.exp(plain_lse - grown)[:, None]
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def _keys(seed, rows=2, columns=8):
  """Logits, in units of log2, that differ widely between states; values."""
  rng = np.random.default_rng(seed)
  counts = rng.integers(1, 9, 6)
  logits = [
    (rng.normal(size=(rows, n)) + 20 * rng.normal()).astype(np.float32)
    for n in counts
  ]
  v = [rng.normal(size=(n, columns)).astype(np.float32) for n in counts]
  return logits, v


def _states(logits, v):
  states = []
  for s, values in zip(logits, v, strict=True):
    m = s.max(axis=1)
    p = np.exp2(s - m[:, None])
    states.append(hopper_state.State(
      jnp.asarray(p @ values), jnp.asarray(m), jnp.asarray(p.sum(axis=1))
    ))
  return states
