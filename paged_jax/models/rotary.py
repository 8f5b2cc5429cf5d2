"""Rotary position embedding, halves layout.

Dimension pairs (i, i + H/2) turn by `position * theta**(-2i/H)`:

    x1' = x1 cos - x2 sin        x2' = x2 cos + x1 sin

Source: Su et al., RoFormer (arXiv:2104.09864). The halves layout is that of
the Hugging Face checkpoints; GGUF files keep q and k rows for the interleaved
one, pairs (2i, 2i+1), and are permuted on loading.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Llama 3.1's stretch of slow frequencies for contexts past training."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Frequencies of the rotary embedding."""

  theta: float = 10_000.0
  scaling: Llama3Scaling | None = None


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns the angle a position of each dimension pair, [H/2] float64.

  With Llama 3 scaling, a wavelength beyond `original_length / low_freq_factor`
  is stretched by `factor`, one below `original_length / high_freq_factor` is
  kept, and those between are interpolated linearly in frequency.
  """
  freqs = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if rope.scaling is None:
    return freqs
  s = rope.scaling
  turns = s.original_length * freqs / (2 * math.pi)
  keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  keep = np.clip(keep, 0, 1)
  return freqs * (keep + (1 - keep) / s.factor)


def rotate(
  x: Float[Array, "T N H"], positions: Int[Array, "T"], rope: Rope
) -> Float[Array, "T N H"]:
  """Rotates every head of token t by its position, in float32."""
  freqs = jnp.asarray(frequencies(rope, x.shape[-1]), jnp.float32)
  angles = positions[:, None, None].astype(jnp.float32) * freqs
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  return rotated.astype(x.dtype)
