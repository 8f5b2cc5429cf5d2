"""One step of training: cross-entropy of the next byte, AdamW, a new state.

    loss = -mean log p(token[s + 1] | token[0..s])     nats a byte

The model is the one that serves through pages; here it attends within whole
windows, without any cache.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from paged_jax.models import contiguous


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that changes in training."""

  step: Int[Array, ""]  # steps taken
  weights: nnx.State
  optimizer: Any  # optax's state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """AdamW under a warmed-up cosine."""

  steps: int  # of the whole run: the cosine ends there
  learning_rate: float  # highest
  warmup: int = 0  # steps to the highest rate
  final: float = 0.1  # last rate, a fraction of the highest
  b2: float = 0.98  # short runs want a short memory of squares
  weight_decay: float = 0.1  # of matrices; scales and biases keep their size
  clip: float = 1.0  # largest global norm of a gradient

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}: pass an int of at least 1")
    if not self.learning_rate > 0:
      raise ValueError(
        f"learning_rate is {self.learning_rate}: pass a number above 0"
      )
    if not 0 <= self.warmup < self.steps:
      raise ValueError(
        f"warmup is {self.warmup}: pass 0 to steps - 1 = {self.steps - 1}"
      )

  def transformation(self) -> optax.GradientTransformation:
    """Returns the optax transformation."""
    schedule = optax.warmup_cosine_decay_schedule(
      init_value=self.learning_rate / (self.warmup + 1),
      peak_value=self.learning_rate,
      warmup_steps=self.warmup,
      decay_steps=self.steps,
      end_value=self.learning_rate * self.final,
    )
    return optax.chain(
      optax.clip_by_global_norm(self.clip),
      optax.adamw(
        schedule,
        b2=self.b2,
        weight_decay=self.weight_decay,
        mask=lambda weights: jax.tree.map(lambda x: x.ndim > 1, weights),
      ),
    )


def create(
  weights: nnx.State, transformation: optax.GradientTransformation
) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    weights=weights,
    optimizer=transformation.init(weights),
  )


def loss(
  weights: nnx.State, tokens: Int[Array, "B S+1"], *, graph: nnx.GraphDef
) -> Float[Array, ""]:
  """Returns the mean cross-entropy of each next token, in nats.

  Args:
    weights: state of the model.
    tokens: int32 [B, S + 1], windows; the first S go in, the last S are
      wanted.
    graph: structure of the model (static).
  """
  logits = contiguous.forward(nnx.merge(graph, weights), tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  ).mean()


def train_step(
  state: TrainState,
  tokens: Int[Array, "B S+1"],
  *,
  graph: nnx.GraphDef,
  transformation: optax.GradientTransformation,
) -> tuple[TrainState, Float[Array, ""]]:
  """Takes one step.

  Args:
    state: the state; donate it.
    tokens: int32 [B, S + 1], windows of text.
    graph: structure of the model (static).
    transformation: optax's (static).

  Returns:
    (state, loss before the step).
  """
  value, gradient = jax.value_and_grad(loss)(
    state.weights, tokens, graph=graph
  )
  updates, optimizer = transformation.update(
    gradient, state.optimizer, state.weights
  )
  state = TrainState(
    step=state.step + 1,
    weights=optax.apply_updates(state.weights, updates),
    optimizer=optimizer,
  )
  return state, value
