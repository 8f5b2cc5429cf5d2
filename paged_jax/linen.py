"""Paged attention as a flax Linen module: the twin of `paged_jax.nnx`.

Parameters have the names of the NNX module's: `q_proj/kernel`, ...
"""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from paged_jax.models import attention
from paged_jax.models.attention import AttentionConfig as AttentionConfig


class PagedAttention(nn.Module):
  """Self-attention whose keys and values live in pages.

  Attributes:
    config: sizes and options.
  """

  config: AttentionConfig

  def setup(self):
    config = self.config
    q, kv = (n * config.head_dim for n in (config.num_heads,
                                           config.num_kv_heads))

    def dense(num_out, bias):
      return nn.Dense(
        num_out,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.dtype,
        precision=config.precision,
      )

    self.q_proj = dense(q, config.qkv_bias)
    self.k_proj = dense(kv, config.qkv_bias)
    self.v_proj = dense(kv, config.qkv_bias)
    self.o_proj = dense(config.features, False)
    if config.qk_norm:
      norm = lambda: nn.RMSNorm(
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        param_dtype=config.dtype,
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
    """Writes the new keys and values and attends: see `paged_jax.nnx`."""
    return attention.attention_layer(
      self, x, cache, step, layer=layer, attend=attend
    )
