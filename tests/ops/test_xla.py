"""What only the jnp implementation promises: one compile, memory, vmap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax

attend = functools.partial(
  paged_jax.paged_attention, implementation="xla", return_lse=True
)


def _problem(seed, lengths, *, query_lengths=None, P=40, M=8, p=8):
  rng = np.random.default_rng(seed)
  B, N, K, H = len(lengths), 6, 2, 16
  T = B if query_lengths is None else sum(query_lengths)
  table = rng.permutation(P)[: B * M].reshape(B, M)
  pools = rng.standard_normal((2, P, K, p, H))
  arrays = dict(
    query=jnp.asarray(rng.standard_normal((T, N, H)), jnp.float32),
    k_pages=jnp.asarray(pools[0], jnp.float32),
    v_pages=jnp.asarray(pools[1], jnp.float32),
    page_table=jnp.asarray(table, jnp.int32),
    lengths=jnp.asarray(lengths, jnp.int32),
  )
  if query_lengths is not None:
    starts = np.cumsum([0, *query_lengths])
    arrays["query_starts"] = jnp.asarray(starts, jnp.int32)
  return arrays


@pytest.mark.parametrize("packed", (False, True))
def test_contents_never_recompile(packed):
  chex.clear_trace_counter()  # it counts by name, across parameters
  call = jax.jit(chex.assert_max_traces(lambda x: attend(**x), n=1))
  for seed, lengths in enumerate(([0, 1, 64], [64, 64, 64], [9, 0, 8])):
    split = ([0, 1, 8], [1, 4, 4], [9, 0, 0])[seed] if packed else None
    call(_problem(seed, lengths, query_lengths=split))


def test_vmap_is_a_loop():
  made = [_problem(s, [5 + s, 0, 60 - s]) for s in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *made)
  call = jax.jit(lambda x: attend(**x))
  out, lse = jax.jit(jax.vmap(lambda x: attend(**x)))(stacked)
  for i, one in enumerate(made):
    want, want_lse = call(one)
    np.testing.assert_allclose(out[i], want, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(lse[i], want_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("T,N,K,H", ((16384, 28, 4, 128), (256, 8, 8, 64)))
def test_memory_follows_the_output_not_the_square(T, N, K, H):
  """The compiled program's own account of its temporaries, in bytes."""
  p, shape = 16, jax.ShapeDtypeStruct
  pool = shape((T // p + 1, K, p, H), jnp.float32)
  compiled = (
    jax.jit(attend)
    .lower(
      shape((T, N, H), jnp.float32),
      pool,
      pool,
      shape((1, T // p), jnp.int32),
      shape((1,), jnp.int32),
      query_starts=shape((2,), jnp.int32),
    )
    .compile()
  )
  output = T * N * H * 4
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 6 * output + 64 * 2**20, temporary / 2**20
