"""Heads split over two devices by shard_map equal one device."""

import os
import pathlib
import subprocess
import sys

import pytest

_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, paged_jax
from jax.sharding import PartitionSpec as P
assert jax.device_count() == 2
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("heads",))
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (3, 8, 16))
k, v = (jax.random.normal(key, (7, 4, 8, 16)) for key in keys[1:])
table = jnp.array([[4, 1, 6], [0, 7, 7], [5, 3, 7]], jnp.int32)
lengths = jnp.array([19, 3, 16], jnp.int32)

def attend(query, k, v, table, lengths):
  return paged_jax.paged_attention(
    query, k, v, table, lengths, implementation="IMPLEMENTATION")

heads = P(None, "heads")
# check_vma: a Pallas call does not say over which axes its outputs vary.
split = jax.jit(jax.shard_map(
  attend, mesh=mesh, in_specs=(heads, heads, heads, P(), P()),
  out_specs=heads, check_vma=False))
got, want = (f(query, k, v, table, lengths) for f in (split, jax.jit(attend)))
np.testing.assert_allclose(got, want, atol=1e-6)
print("equal")
"""


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_heads_over_two_devices(implementation):
  flags = "--xla_force_host_platform_device_count=2"
  result = subprocess.run(
    [sys.executable, "-c", _SCRIPT.replace("IMPLEMENTATION", implementation)],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu"),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.stdout.strip() == "equal", result.stderr[-2000:]
