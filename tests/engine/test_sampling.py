"""The sampler against what its definition allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.engine import sampling


def _draws(logits, count=2000, **options):
  keys = jax.random.split(jax.random.key(0), count)
  draw = lambda key: sampling.sample(logits, key, sampling.Sampling(**options))
  return np.asarray(jax.vmap(draw)(keys))


def test_greedy_takes_the_largest():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)))
  got = sampling.sample(logits, jax.random.key(0), sampling.Sampling())
  np.testing.assert_array_equal(got, logits.argmax(-1))


def test_frequencies_follow_the_temperature():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
  draws = _draws(logits, temperature=0.5)
  for row in range(2):
    want = np.exp(2 * np.asarray(logits[row]))
    want /= want.sum()
    got = np.bincount(draws[:, row], minlength=3) / len(draws)
    np.testing.assert_allclose(got, want, atol=0.04)  # 3.6 standard errors


def test_top_k():
  logits = jnp.array([[1.0, 3.0, 2.0, 0.0]])
  assert set(_draws(logits, temperature=5.0, top_k=2)[:, 0]) == {1, 2}
  assert set(_draws(logits, temperature=5.0, top_k=9)[:, 0]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
  "top_p, kept", [(0.1, {2}), (0.5, {2}), (0.51, {2, 0}), (0.9, {2, 0, 3})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
  logits = jnp.log(jnp.array([[0.3, 0.05, 0.5, 0.15]]))
  assert set(_draws(logits, temperature=1.0, top_p=top_p)[:, 0]) == kept


@pytest.mark.parametrize(
  "options",
  [
    dict(temperature=-1.0),
    dict(temperature=float("nan")),
    dict(top_k=0),
    dict(top_p=0.0),
    dict(top_p=1.5),
  ],
)
def test_bad_options(options):
  (name,) = options
  with pytest.raises(ValueError, match=f"{name} is"):
    sampling.Sampling(**options)
