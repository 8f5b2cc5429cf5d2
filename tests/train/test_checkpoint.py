"""States on disk: bit for bit, and one line where orbax is missing."""

import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.models import config as config_lib
from paged_jax.models.transformer import Transformer
from paged_jax.train import checkpoint
from paged_jax.train import step as step_lib

_SIZES = dict(
  vocab_size=32, features=8, num_layers=2, num_heads=2, num_kv_heads=1,
  head_dim=4, hidden=16, qk_norm=True, dtype="float32",
)


def make(seed):
  config = config_lib.ModelConfig(**_SIZES)
  _, weights = nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))
  transformation = step_lib.Optimizer(
    steps=9, learning_rate=1e-3
  ).transformation()
  state = step_lib.create(weights, transformation)
  leaves, structure = jax.tree.flatten(state)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    structure,
    [
      jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype)
      if x.ndim
      else x + seed
      for x in leaves
    ],
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_round_trip(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "runs" / "checkpoints")
  assert checkpoints.latest_step is None
  with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
    checkpoints.config()
  for seed in (1, 2, 3):
    checkpoints.save(make(seed), dict(model=_SIZES, seed=seed))
  assert checkpoints.latest_step == 3
  assert checkpoints.config() == dict(model=_SIZES, seed=3)
  assert_same(checkpoints.restore(make(7)), make(3))
  model = checkpoints.load_model()
  assert model.config == config_lib.ModelConfig(**_SIZES)
  assert_same(nnx.split(model)[1], make(3).weights)
  # The oldest is gone, the others moved as one.
  old = checkpoints.set_aside()
  assert sorted(path.name for path in old.iterdir()) == ["2", "3"]
  assert checkpoints.latest_step is None and checkpoints.set_aside() is None


def test_missing_library(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
  with pytest.raises(ImportError, match=r"pip install 'paged_jax\[train\]'"):
    checkpoint.Checkpoints(tmp_path)
