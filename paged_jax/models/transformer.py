"""A decoder of the Llama / Qwen2 / Qwen3 family, in NNX.

    x = embed[tokens]
    x += attention(norm(x));  x += down(silu(gate(n)) * up(n)), n = norm(x)
    logits = norm(x) @ head.T

Tokens are packed [T]; the cache of all layers goes in and comes back. The
layers run in a Python loop: each then reads its own weights in place, and
`layer` is a constant of the kernel.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax import nnx as paged_nnx
from paged_jax.models import attention
from paged_jax.models.config import ModelConfig


class Mlp(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    def linear(num_in, num_out):
      return nnx.Linear(
        num_in,
        num_out,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.dtype,
        precision=config.attention.precision,
        rngs=rngs,
      )

    self.gate_proj = linear(config.features, config.hidden)
    self.up_proj = linear(config.features, config.hidden)
    self.down_proj = linear(config.hidden, config.features)

  def __call__(
    self, x: Float[Array, "T features"]
  ) -> Float[Array, "T features"]:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """One pre-norm layer."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    self.attention = paged_nnx.PagedAttention(config.attention, rngs=rngs)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = Mlp(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "T features"],
    cache: Any,
    step: Any,
    *,
    layer: int,
    attend: attention.Attend,
  ) -> tuple[Float[Array, "T features"], Any]:
    y, cache = self.attention(
      self.attention_norm(x), cache, step, layer=layer, attend=attend
    )
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
  """The decoder."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Makes a model with random weights.

    Args:
      config: sizes and options.
      rngs: source of the initial weights.
    """
    self.config = config
    embed = lambda: nnx.Embed(
      config.vocab_size,
      config.features,
      dtype=config.dtype,
      param_dtype=config.dtype,
      rngs=rngs,
    )
    self.embed = embed()
    self.layers = nnx.List(
      [Block(config, rngs=rngs) for _ in range(config.num_layers)]
    )
    self.norm = _norm(config, rngs)
    if not config.tied:
      self.head = embed()  # [vocab, features], like the embedding

  def __call__(
    self,
    tokens: Int[Array, "T"],
    cache: Any,
    step: Any,
    *,
    rows: Int[Array, "R"] | None = None,
    attend: attention.Attend = attention.attend_paged,
  ) -> tuple[Float[Array, "R vocab"], Any]:
    """Runs all layers over packed tokens.

    Args:
      tokens: int32 [T], ids of the packed tokens; idle ones may be anything
        below vocab_size.
      cache: a `paged_jax.cache.pool.Cache` of L layers.
      step: a `paged_jax.models.step.Step`.
      rows: the packed tokens whose logits are wanted, int32 [R]; None: all T.
      attend: where keys and values live; by default in pages.

    Returns:
      (logits [R, vocab] float32, cache).
    """
    x = self.embed(tokens)
    for layer, block in enumerate(self.layers):
      x, cache = block(x, cache, step, layer=layer, attend=attend)
    x = self.norm(x if rows is None else x[rows])
    head = self.embed if self.config.tied else self.head
    logits = jnp.einsum(
      "tf,vf->tv",
      x,
      head.embedding[...],
      precision=self.config.attention.precision,
      preferred_element_type=jnp.float32,
    )
    return logits, cache


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.features,
    epsilon=config.norm_epsilon,
    dtype=config.dtype,
    param_dtype=config.dtype,
    rngs=rngs,
  )
