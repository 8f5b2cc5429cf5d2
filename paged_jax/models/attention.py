"""The attention layer without its weights: what NNX and Linen modules share.

    x [T, features] --q/k/v_proj--> heads --norm--> rotary --> write slots
                                                               |
    y [T, features] <--o_proj-- [T, N*H] <---- attend ---------+

A module holds the projections; `attention_layer` holds the order of things.
"""

import dataclasses
from typing import Any, Protocol

from jaxtyping import Array, Float

from paged_jax.cache.pool import Cache
from paged_jax.models import rotary
from paged_jax.ops import api
from paged_jax.ops import inputs as inputs_lib
from paged_jax.ops import write_kv as write_kv_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Sizes and options of one attention layer."""

  features: int
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  qkv_bias: bool = False
  qk_norm: bool = False  # RMS norm of each q and k head, before rotary
  norm_epsilon: float = 1e-6
  # None: no positions at all.
  rope: rotary.Rope | None = dataclasses.field(default_factory=rotary.Rope)
  window: int | None = None  # a token sees this many, itself included
  soft_cap: float | None = None
  dtype: str = "float32"  # of weights, activations and cache

  def __post_init__(self):
    for name in ("features", "num_heads", "num_kv_heads", "head_dim"):
      inputs_lib.check_int(name, getattr(self, name), 1)
    inputs_lib.check_causal(True, self.window)
    inputs_lib.check_dtype("dtype", self.dtype)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads is {self.num_heads}, not a multiple of num_kv_heads="
        f"{self.num_kv_heads}: every kv head serves as many query heads"
      )
    if self.rope is not None and self.head_dim % 2:
      raise ValueError(
        f"head_dim is {self.head_dim}: rotary embedding turns pairs of "
        "dimensions; pass an even one or rope=None"
      )

  @property
  def precision(self) -> str | None:
    """Of the projections: float32 means float32, not TF32, on a GPU."""
    return "highest" if self.dtype == "float32" else None


class Attend(Protocol):
  """Stores new keys and values and attends to all of them."""

  def __call__(
    self,
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: Any,
    step: Any,
    *,
    layer: int,
    config: AttentionConfig,
  ) -> tuple[Float[Array, "T N H"], Any]: ...


def attend_paged(
  q: Float[Array, "T N H"],
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  cache: Cache,
  step: Any,
  *,
  layer: int,
  config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], Cache]:
  """Writes k and v to the step's slots of `layer` and attends through pages.

  Args:
    q: queries [T, N, H].
    k: new keys [T, K, H], rotated.
    v: new values [T, K, H].
    cache: pools of all layers; the layer is picked inside the kernel.
    step: a `paged_jax.models.step.Step`.
    layer: 0..L-1.
    config: window and soft cap.

  Returns:
    (out [T, N, H], cache).
  """
  k_pages, v_pages = write_kv_lib.write_kv(
    cache.k_pages, cache.v_pages, k, v, step.slots, layer=layer
  )
  out = api.paged_attention(
    q,
    k_pages,
    v_pages,
    step.page_table,
    step.lengths,
    query_starts=step.query_starts,
    max_query_length=step.max_query_length,
    layer=layer,
    window=config.window,
    soft_cap=config.soft_cap,
    plan=step.plan_for(config),
    implementation=step.implementation,
    interpret=step.interpret,
  )
  return out, Cache(k_pages=k_pages, v_pages=v_pages)


def attention_layer(
  module: Any,
  x: Float[Array, "T features"],
  cache: Any,
  step: Any,
  *,
  layer: int,
  attend: Attend = attend_paged,
) -> tuple[Float[Array, "T features"], Any]:
  """Runs a module's projections around `attend`.

  Args:
    module: holds `config`, `q_proj`, `k_proj`, `v_proj`, `o_proj`, and with
      `config.qk_norm` also `q_norm` and `k_norm`, all callable.
    x: [T, features].
    cache: what `attend` stores into.
    step: has `positions` [T], and what `attend` needs.
    layer: 0..L-1.
    attend: where keys and values live.

  Returns:
    (y [T, features], cache).
  """
  config = module.config
  heads = (x.shape[0], -1, config.head_dim)
  q = module.q_proj(x).reshape(heads)
  k = module.k_proj(x).reshape(heads)
  v = module.v_proj(x).reshape(heads)
  if config.qk_norm:
    q, k = module.q_norm(q), module.k_norm(k)
  if config.rope is not None:
    q = rotary.rotate(q, step.positions, config.rope)
    k = rotary.rotate(k, step.positions, config.rope)
  out, cache = attend(q, k, v, cache, step, layer=layer, config=config)
  return module.o_proj(out.reshape(x.shape[0], -1)), cache
