"""Sizes of decoders: one frozen dataclass, and the public models by name."""

import dataclasses

from paged_jax.models.attention import AttentionConfig
from paged_jax.models.rotary import Llama3Scaling, Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder of the Llama / Qwen2 / Qwen3 family."""

  vocab_size: int
  features: int
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  hidden: int  # width of the SwiGLU
  qkv_bias: bool = False
  qk_norm: bool = False
  tied: bool = True  # whether the head is the embedding
  norm_epsilon: float = 1e-6
  rope: Rope = dataclasses.field(default_factory=Rope)
  window: int | None = None
  dtype: str = "float32"  # of weights, activations and cache

  @property
  def attention(self) -> AttentionConfig:
    return AttentionConfig(
      features=self.features,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      qkv_bias=self.qkv_bias,
      qk_norm=self.qk_norm,
      norm_epsilon=self.norm_epsilon,
      rope=self.rope,
      window=self.window,
      dtype=self.dtype,
    )


_MODELS = {
  "tiny": dict(
    vocab_size=512,
    features=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden=64,
    qkv_bias=True,
    qk_norm=True,
  ),
  "smollm2-135m": dict(
    vocab_size=49152,
    features=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden=1536,
    norm_epsilon=1e-5,
    rope=Rope(theta=100_000.0),
  ),
  "qwen2.5-0.5b": dict(
    vocab_size=151_936,
    features=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    hidden=4864,
    qkv_bias=True,
    rope=Rope(theta=1e6),
  ),
  "qwen2.5-7b": dict(
    vocab_size=152_064,
    features=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    hidden=18_944,
    qkv_bias=True,
    tied=False,
    rope=Rope(theta=1e6),
  ),
  "qwen3-0.6b": dict(
    vocab_size=151_936,
    features=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    hidden=3072,
    qk_norm=True,
    rope=Rope(theta=1e6),
  ),
  "qwen3-8b": dict(
    vocab_size=151_936,
    features=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden=12_288,
    qk_norm=True,
    tied=False,
    rope=Rope(theta=1e6),
  ),
  # Llama 3.1: 3.0 is the same without the stretched frequencies.
  "llama3-8b": dict(
    vocab_size=128_256,
    features=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden=14_336,
    tied=False,
    norm_epsilon=1e-5,
    rope=Rope(theta=500_000.0, scaling=Llama3Scaling()),
  ),
}

NAMES = tuple(_MODELS)


def named(name: str, **changes: object) -> ModelConfig:
  """Returns the config of a public model.

  Args:
    name: one of `NAMES`.
    **changes: fields of `ModelConfig` to set differently, such as
      `dtype="bfloat16"`.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in _MODELS:
    raise ValueError(f"name is {name!r}: pass one of {', '.join(NAMES)}")
  return ModelConfig(**{**_MODELS[name], **changes})
