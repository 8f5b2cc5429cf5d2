"""The loss against NumPy float64; what an optimizer step may touch."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.models import huggingface
from paged_jax.train import step as step_lib
from tests.models import checkpoints


def test_loss_is_the_oracles_cross_entropy():
  config = checkpoints.variant("qwen3")
  tensors = checkpoints.random_tensors(config)
  graph, weights = nnx.split(huggingface.from_tensors(config, tensors))
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 12))
  nats = []
  for row in tokens:
    logits = checkpoints.logits(config, tensors, row[:-1])
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    nats += list(log_z + logits.max(-1) - logits[np.arange(11), row[1:]])
  loss = step_lib.loss(weights, jnp.asarray(tokens, jnp.int32), graph=graph)
  np.testing.assert_allclose(loss, np.mean(nats), rtol=1e-5)


def test_weight_decay_spares_vectors():
  weights = dict(matrix=jnp.ones((2, 2)), scale=jnp.ones(2))
  transformation = step_lib.Optimizer(
    steps=4, learning_rate=0.5, weight_decay=0.1
  ).transformation()
  state = step_lib.create(weights, transformation)
  # No gradient: what changes is decayed, by 0.5 * 0.1.
  updates, _ = transformation.update(
    jax.tree.map(jnp.zeros_like, weights), state.optimizer, weights
  )
  np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(steps=0), "steps is 0"),
    (dict(learning_rate=0.0), "learning_rate is 0.0"),
    (dict(learning_rate=float("nan")), "learning_rate is nan"),
    (dict(warmup=10), "warmup is 10: pass 0 to steps - 1 = 9"),
  ],
)
def test_bad_optimizer(changes, message):
  with pytest.raises(ValueError, match=message):
    step_lib.Optimizer(**(dict(steps=10, learning_rate=1e-3) | changes))
