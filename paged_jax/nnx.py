"""Paged attention as a flax NNX module."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from paged_jax.models import attention
from paged_jax.models.attention import AttentionConfig as AttentionConfig


class PagedAttention(nnx.Module):
  """Self-attention whose keys and values live in pages.

  It holds weights only: the cache goes in and comes back.

      cache = create_cache(num_layers=L, ...)
      table, step, ok = prefill_step(table, num_tokens, config, total=T)
      y, cache = layer(x, cache, step, layer=0)
  """

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    """Makes the projections.

    Args:
      config: sizes and options.
      rngs: source of the initial weights.
    """
    self.config = config
    q, kv = (n * config.head_dim for n in (config.num_heads,
                                           config.num_kv_heads))

    def linear(num_in, num_out, bias):
      return nnx.Linear(
        num_in,
        num_out,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.dtype,
        precision=config.precision,
        rngs=rngs,
      )

    self.q_proj = linear(config.features, q, config.qkv_bias)
    self.k_proj = linear(config.features, kv, config.qkv_bias)
    self.v_proj = linear(config.features, kv, config.qkv_bias)
    self.o_proj = linear(q, config.features, False)
    if config.qk_norm:
      norm = lambda: nnx.RMSNorm(
        config.head_dim,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        param_dtype=config.dtype,
        rngs=rngs,
      )
      self.q_norm, self.k_norm = norm(), norm()

  def __call__(
    self,
    x: Float[Array, "T features"],
    cache: Any,
    step: Any,
    *,
    layer: int,
    attend: attention.Attend = attention.attend_paged,
  ) -> tuple[Float[Array, "T features"], Any]:
    """Writes the new keys and values and attends.

    Args:
      x: packed tokens [T, features], in the config's dtype.
      cache: a `paged_jax.cache.pool.Cache` of L layers.
      step: a `paged_jax.models.step.Step`.
      layer: which layer of the cache this module is, 0..L-1.
      attend: where keys and values live; by default in pages.

    Returns:
      (y [T, features], cache).
    """
    return attention.attention_layer(
      self, x, cache, step, layer=layer, attend=attend
    )
