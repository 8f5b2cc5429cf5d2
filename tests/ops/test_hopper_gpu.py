"""Implementation `hopper` on a GPU: large pools, many repetitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from tests.conformance import data

pytestmark = pytest.mark.gpu


def test_a_pool_of_more_than_2_to_31_elements():
  made = data.problem(54, lengths=(317, 95), N=32, K=8, H=128, p=16,
                      dtype=jnp.bfloat16)
  few = made.k_pages.shape[0]
  pages = 2**30 // made.k_pages[0].size + 99  # a layer of two

  def grown(pool):
    big = jnp.zeros((2, pages, *pool.shape[1:]), pool.dtype)
    return big.at[1, pages - few :].set(pool)

  big = made.replace(
    k_pages=grown(made.k_pages), v_pages=grown(made.v_pages),
    page_table=made.page_table + (pages - few),
  )
  assert big.k_pages.size > 2**31
  out, lse = data.call(big, "hopper", layer=jnp.int32(1))
  data.assert_right(made, out, lse)


@pytest.mark.parametrize("number", [0, 2**32 - 1, 0x7FC0_7FC0, 1])
def test_memory_that_holds_anything_before(number):
  """Parts, flags and the count of tiles lie in memory that nobody clears."""
  made = data.problem(56, lengths=(9000, 95, 0, 700), N=32, K=8, H=128, p=16,
                      dtype=jnp.bfloat16)
  plan = paged_jax.plan_attention(
    made.page_table, made.lengths, num_heads=32, num_kv_heads=8, head_dim=128,
    page_size=16, dtype=jnp.bfloat16, implementation="hopper",
  )
  assert plan.work.config.paced
  for _ in range(5):
    filled = [jnp.full(2**k, number, jnp.uint32) for k in range(8, 27)]
    jax.block_until_ready(filled)
    del filled
    data.assert_right(made, *data.call(made, "hopper", plan=plan))


@pytest.mark.parametrize("H, N, K", [(128, 32, 8), (64, 14, 2), (256, 16, 8)])
def test_batch_invariance_wherever_cuts_fall(H, N, K):
  """Bits are the same alone, in company and in another place."""
  lengths = (5000, 95, 0, 3000, 700, 8000, 1)
  made = data.problem(62, lengths=lengths, N=N, K=K, H=H, p=16, sinks=True,
                      dtype=jnp.bfloat16)

  def attend(made):
    plan = paged_jax.plan_attention(
      made.page_table, made.lengths, num_heads=N, num_kv_heads=K, head_dim=H,
      page_size=16, dtype=jnp.bfloat16, batch_invariant=True,
    )
    return data.call(made, None, plan=plan)

  out, lse = attend(made)
  data.assert_right(made, out, lse)
  for rows in ([0], [5], [3, 1], [6, 5, 4, 3, 2, 1, 0], [5, 0, 5, 0, 5]):
    rows = np.array(rows)
    part = made.replace(
      query=made.query[rows], page_table=made.page_table[rows],
      lengths=made.lengths[rows],
    )
    data.assert_same_bits(attend(part), (out[rows], lse[rows]))


@pytest.mark.parametrize(
  "changes, batch_invariant",
  [
    ({}, False),
    ({}, True),
    (dict(H=64, N=64, window=128, sinks=True), False),  # whole segments
    (dict(H=64, N=14, K=2), False),
  ],
)
def test_1000_repetitions_are_bitwise_equal(changes, batch_invariant):
  settings = dict(N=32, K=8, H=128, p=16, dtype=jnp.bfloat16) | changes
  rng = np.random.default_rng(55)
  lengths = (0, 1, 8000, *rng.integers(1, 4000, 61).tolist())
  made = data.problem(55, lengths=lengths, **settings)
  _, K, p, H = made.k_pages.shape
  plan = paged_jax.plan_attention(
    made.page_table, made.lengths, num_heads=made.query.shape[1],
    num_kv_heads=K, head_dim=H, page_size=p, dtype=made.query.dtype,
    window=made.static.get("window"), implementation="hopper",
    batch_invariant=batch_invariant,
  )
  want = data.call(made, "hopper", plan=plan)
  data.assert_right(made, *want)

  @jax.jit
  def differs(got):
    bits = jnp.uint16, jnp.int32
    return jnp.stack([
      (a.view(t) != b.view(t)).any()
      for a, b, t in zip(got, want, bits, strict=True)
    ]).any()

  run = jax.jit(lambda: data.call(made, "hopper", jit=False, plan=plan))
  differing = sum(differs(run()) for _ in range(1000))
  assert int(differing) == 0
