"""The four stage kernels, jnp and Pallas, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.simulate import pallas_stages, stages

N, K, H, P, G = 6, 2, 16, 8, 2  # G blocks a task
IMPLEMENTATIONS = pytest.mark.parametrize("impl", [stages, pallas_stages])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def draw(shape, dtype="float32", seed=0):
  x = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(x).astype(dtype)


def wide(x):
  return np.asarray(x).astype(np.float64)


def by_token(tiles):
  """[g, K, p, H] -> [N, g * p, H], the KV head of each query head."""
  tokens = np.moveaxis(wide(tiles), 1, 0).reshape(K, G * P, H)
  return np.repeat(tokens, N // K, axis=0)


@IMPLEMENTATIONS
@DTYPES
def test_qk(impl, dtype):
  q, k = draw((N, H), dtype), draw((G, K, P, H), dtype, 1)
  s = jax.jit(impl.qk_matmul)(q, k)
  assert s.dtype == jnp.float32
  want = np.einsum("nh,nth->nt", wide(q), by_token(k))
  np.testing.assert_allclose(wide(s), want, rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("live", [1, 11, G * P])
def test_softmax(impl, dtype, live):
  s = wide(draw((N, G * P), seed=2)) * 4
  poisoned = s.copy()
  poisoned[:, live:] = np.nan
  run = jax.jit(
    lambda x, n: impl.softmax_prepare(x, n, scale=0.25, dtype=jnp.dtype(dtype))
  )
  p, m, l = run(jnp.float32(poisoned), np.int32(live))
  assert (p.dtype, m.dtype, l.dtype) == (dtype, jnp.float32, jnp.float32)
  top = 0.25 * s[:, :live].max(1, keepdims=True)
  want = np.exp(0.25 * s[:, :live] - top)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(wide(m), top, rtol=1e-6)
  np.testing.assert_allclose(wide(p)[:, :live], want, rtol=eps + 1e-6)
  assert (wide(p)[:, live:] == 0).all()
  # The sum of what was rounded, not of what was meant.
  np.testing.assert_allclose(
    wide(l), wide(p).sum(1, keepdims=True), rtol=1e-6
  )


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("live", [1, 11, G * P])
def test_pv_ignores_poison(impl, dtype, live):
  p = np.abs(wide(draw((N, G * P), seed=3)))
  p[:, live:] = 0
  p = jnp.asarray(p).astype(dtype)
  v = np.asarray(draw((G, K, P, H), dtype, 4)).copy()
  dead = np.arange(G * P).reshape(G, P) >= live
  np.moveaxis(v, 1, 2)[dead] = np.nan
  o = jax.jit(impl.pv_matmul)(p, v, np.int32(live))
  assert o.dtype == jnp.float32
  want = np.einsum("nt,nth->nh", wide(p)[:, :live], by_token(v)[:, :live])
  np.testing.assert_allclose(wide(o), want, rtol=1e-5, atol=1e-5)


def random_state(seed):
  return (
    draw((N, 1), seed=seed) * 5,
    jnp.abs(draw((N, 1), seed=seed + 1)) + 1,
    draw((N, H), seed=seed + 2),
  )


EMPTY = jnp.full((N, 1), -jnp.inf), jnp.zeros((N, 1)), jnp.zeros((N, H))


@IMPLEMENTATIONS
@pytest.mark.parametrize("last", [False, True])
def test_update_merges(impl, last):
  a, b = random_state(5), random_state(8)
  m, l, acc = jax.jit(
    lambda x, y: impl.online_update(x, y, last=last)
  )(a, b)
  top = np.maximum(wide(a[0]), wide(b[0]))
  w_a, w_b = np.exp(wide(a[0]) - top), np.exp(wide(b[0]) - top)
  total = w_a * wide(a[1]) + w_b * wide(b[1])
  want = w_a * wide(a[2]) + w_b * wide(b[2])
  np.testing.assert_allclose(wide(m), top)
  np.testing.assert_allclose(wide(l), total, rtol=1e-5)
  np.testing.assert_allclose(
    wide(acc), want / total if last else want, rtol=1e-5, atol=1e-6
  )


@IMPLEMENTATIONS
def test_empty_state_is_neutral(impl):
  a = random_state(11)
  for x, y in ((a, EMPTY), (EMPTY, a)):
    for got, want in zip(impl.online_update(x, y, last=False), a):
      np.testing.assert_array_equal(got, want)
  m, l, acc = impl.online_update(EMPTY, EMPTY, last=True)
  assert np.isneginf(m).all() and not l.any() and not acc.any()


@IMPLEMENTATIONS
def test_update_survives_extreme_maxima(impl):
  small, large = random_state(13), random_state(16)
  small = small[0] - 4e6, *small[1:]
  large = large[0] + 6e4, *large[1:]
  _, _, acc = impl.online_update(small, large, last=True)
  np.testing.assert_allclose(acc, large[2] / large[1], rtol=1e-6)
