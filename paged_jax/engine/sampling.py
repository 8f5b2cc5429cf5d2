"""The next token from its logits.

    logits / temperature -> keep the top k -> keep the nucleus -> draw

Source: Holtzman et al., The curious case of neural text degeneration
(arXiv:1904.09751), for the nucleus (top-p).
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are drawn; compiled in."""

  temperature: float = 0.0  # 0: the most likely token, always
  top_k: int | None = None  # draw among this many
  top_p: float | None = None  # draw among the fewest with this much mass

  def __post_init__(self):
    if not self.temperature >= 0:
      raise ValueError(
        f"temperature is {self.temperature!r}: pass 0 (greedy) or more"
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k is {self.top_k!r}: pass None or at least 1")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p!r}: pass None or 0 < top_p <= 1")


def sample(
  logits: Float[Array, "B vocab"], key: PRNGKeyArray, sampling: Sampling
) -> Int[Array, "B"]:
  """Draws one token a row.

  Args:
    logits: [B, vocab] float32.
    key: a PRNG key; unused when greedy.
    sampling: how.

  Returns:
    int32 [B].
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k is not None:
    k = min(sampling.top_k, logits.shape[-1])
    least = lax.top_k(logits, k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p is not None:
    ranked = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass  # mass of likelier tokens
    least = jnp.min(
      jnp.where(before < sampling.top_p, ranked, jnp.inf), -1, keepdims=True
    )
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)
