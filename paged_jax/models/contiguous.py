"""The same decoder over an ordinary cache: what pages are compared with.

    k, v: L arrays [B, S, K, H], every row S tokens long whether used or not

The weights, projections and rotary embedding are those of the paged path;
only where keys and values live differs. One array a layer, since a slice of a
stacked one would be copied. `jax.nn.dot_product_attention` does the rest.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.models.attention import AttentionConfig
from paged_jax.models.config import ModelConfig
from paged_jax.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContiguousCache:
  """Keys and values of all layers, S tokens a row."""

  k: tuple[Float[Array, "B S K H"], ...]
  v: tuple[Float[Array, "B S K H"], ...]
  lengths: Int[Array, "B"]  # tokens written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Positions:
  positions: Int[Array, "T"]


def create_cache(
  config: ModelConfig, *, num_sequences: int, max_length: int
) -> ContiguousCache:
  """Returns a cache of zeros, [B, S, K, H] a layer.

  Args:
    config: the model.
    num_sequences: B.
    max_length: S, tokens a row.
  """
  shape = (num_sequences, max_length, config.num_kv_heads, config.head_dim)
  make = lambda: tuple(
    jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)
  )
  return ContiguousCache(
    k=make(), v=make(), lengths=jnp.zeros((num_sequences,), jnp.int32)
  )


def forward(
  model: Transformer, tokens: Int[Array, "B S"]
) -> Float[Array, "B S vocab"]:
  """Returns the logits of whole sequences, without a cache (for training)."""
  B, S = tokens.shape
  attend = functools.partial(_attend_new, batch=B)
  logits, _ = model(tokens.reshape(-1), None, _fresh(B, S), attend=attend)
  return logits.reshape(B, S, -1)


def prefill(
  model: Transformer,
  cache: ContiguousCache,
  tokens: Int[Array, "B S0"],
  num_tokens: Int[Array, "B"],
  *,
  every: bool = False,
  implementation: str | None = None,
) -> tuple[
  Float[Array, "B vocab"] | Float[Array, "B S0 vocab"], ContiguousCache
]:
  """Fills an empty cache with prompts.

  Args:
    model: the decoder.
    cache: an empty cache of B rows; donate it.
    tokens: int32 [B, S0], prompts, padded at the right with any id.
    num_tokens: int32 [B], tokens of each prompt, 1..S0.
    every: whether the logits of all tokens are wanted (static).
    implementation: of `jax.nn.dot_product_attention`: "xla", "cudnn" or None
      for its default.

  Returns:
    (logits of each row's last token [B, vocab] float32, cache); with `every`
    of all tokens [B, S0, vocab], meaningless where a prompt has none.
  """
  B, S = tokens.shape
  attend = functools.partial(
    _attend_new, batch=B, implementation=implementation
  )
  rows = None if every else jnp.arange(B) * S + num_tokens - 1
  logits, cache = model(
    tokens.reshape(-1), cache, _fresh(B, S), rows=rows, attend=attend
  )
  if every:
    logits = logits.reshape(B, S, -1)
  return logits, dataclasses.replace(cache, lengths=num_tokens)


def decode(
  model: Transformer, cache: ContiguousCache, tokens: Int[Array, "B"]
) -> tuple[Float[Array, "B vocab"], ContiguousCache]:
  """Adds one token to each row.

  Args:
    model: the decoder.
    cache: a filled cache; donate it.
    tokens: int32 [B].

  Returns:
    (logits [B, vocab] float32, cache).
  """
  step = _Positions(positions=cache.lengths)
  logits, cache = model(tokens, cache, step, attend=_attend_cache)
  return logits, dataclasses.replace(cache, lengths=cache.lengths + 1)


def _fresh(batch: int, length: int) -> _Positions:
  positions = jnp.arange(length, dtype=jnp.int32)
  return _Positions(positions=jnp.tile(positions, batch))


def _attend_new(
  q: Float[Array, "T N H"],
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  cache: ContiguousCache | None,
  step: Any,
  *,
  layer: int,
  config: AttentionConfig,
  batch: int,
  implementation: str | None = None,
):
  """Causal attention within the new tokens of `batch` rows."""
  q, k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v))
  _check(config)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    is_causal=True,
    local_window_size=_window(config),
    implementation=implementation,
  )
  if cache is not None:
    put = lambda old, new: old.at[:, : new.shape[1]].set(new)
    cache = _replace(
      cache, layer, put(cache.k[layer], k), put(cache.v[layer], v)
    )
  return out.reshape(-1, *out.shape[2:]), cache


def _attend_cache(
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K H"],
  cache: ContiguousCache,
  step: Any,
  *,
  layer: int,
  config: AttentionConfig,
):
  """One new token a row over its whole cache."""
  _check(config)
  row = jnp.arange(q.shape[0])
  k_all = cache.k[layer].at[row, cache.lengths].set(k, mode="drop")
  v_all = cache.v[layer].at[row, cache.lengths].set(v, mode="drop")
  mask = None
  if config.window is not None:
    position = jnp.arange(k_all.shape[1])
    mask = position > cache.lengths[:, None] - config.window
    mask = mask[:, None, None]
  out = jax.nn.dot_product_attention(
    q[:, None],
    k_all,
    v_all,
    mask=mask,
    key_value_seq_lengths=cache.lengths + 1,
  )
  return out[:, 0], _replace(cache, layer, k_all, v_all)


def _window(config: AttentionConfig) -> tuple[int, int] | None:
  # dot_product_attention counts the neighbours, our window the token too.
  return None if config.window is None else (config.window - 1, 0)


def _check(config: AttentionConfig) -> None:
  if config.soft_cap is not None:
    raise NotImplementedError(
      "soft_cap: jax.nn.dot_product_attention has none; use the paged path"
    )


def _replace(cache, layer, k, v):
  return dataclasses.replace(
    cache,
    k=(*cache.k[:layer], k, *cache.k[layer + 1 :]),
    v=(*cache.v[:layer], v, *cache.v[layer + 1 :]),
  )
