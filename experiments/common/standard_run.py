"""The standard model's run that a paged one is held against.

Prompts of all rows at once, then decode steps fed with the likeliest token,
over an ordinary cache [B, S, K, H] a layer. The paged path is fed the same
tokens. For half precision there are two more: the same weights in float32, and
a naive attention that rounds whatever it can to the dtype.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from paged_jax.models import contiguous
from paged_jax.models.attention import AttentionConfig
from paged_jax.models.contiguous import ContiguousCache
from paged_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a path computed and stored, in float32 on the host."""

  prefill: Float[np.ndarray, "R vocab"]  # logits, row after row
  decode: Float[np.ndarray, "D B vocab"]  # logits of each step
  k: Float[np.ndarray, "L S K H"]  # tokens of all rows, row after row
  v: Float[np.ndarray, "L S K H"]
  problem: str = ""  # what else went wrong


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Positions:
  positions: Int[Array, "T"]


def pad(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "B S0"]:
  """Returns the prompts, zeros to the right of the short ones."""
  padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  return padded


def run(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  num_steps: int,
  *,
  fed: Int[np.ndarray, "D B"] | None = None,
  naive: bool = False,
) -> tuple[Run, Int[np.ndarray, "D B"]]:
  """Runs the model over an ordinary cache.

  Args:
    model: the decoder.
    prompts: token ids, B of them.
    num_steps: D, decode steps.
    fed: the token of each row and step; None: the likeliest.
    naive: whether `naive_attend` takes the place of the library's attention.

  Returns:
    (run, fed).
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  cache = contiguous.create_cache(
    model.config,
    num_sequences=len(prompts),
    max_length=int(lengths.max()) + num_steps,
  )
  graph, weights = nnx.split(model)
  prefill = functools.partial(contiguous.prefill, every=True)
  decode = contiguous.decode
  # jax.nn.dot_product_attention has no float16 on a CPU.
  halves = model.config.dtype == "float16" and jax.default_backend() == "cpu"
  if naive or halves:
    prefill, decode = _naive_prefill, _naive_decode

  @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
  def call(function, weights, cache, *args):
    return function(nnx.merge(graph, weights), cache, *args)

  logits, cache = call(prefill, weights, cache, pad(prompts), lengths)
  logits = np.asarray(logits)
  tokens = logits[np.arange(len(prompts)), lengths - 1].argmax(-1)
  whole = np.concatenate([row[:n] for row, n in zip(logits, lengths)])
  steps, used = [], []
  for i in range(num_steps):
    tokens = np.asarray(tokens if fed is None else fed[i], np.int32)
    logits, cache = call(decode, weights, cache, tokens)
    used.append(tokens)
    steps.append(np.asarray(logits))
    tokens = steps[-1].argmax(-1)
  pools = []
  for layers in (cache.k, cache.v):
    stored = np.stack([np.asarray(x, np.float32) for x in layers])
    rows = [stored[:, b, : n + num_steps] for b, n in enumerate(lengths)]
    pools.append(np.concatenate(rows, axis=1))
  return Run(
    prefill=whole, decode=np.stack(steps), k=pools[0], v=pools[1]
  ), np.stack(used)


def in_float32(model: Transformer) -> Transformer:
  """Returns the model with the same weights, all arithmetic in float32."""
  config = dataclasses.replace(model.config, dtype="float32")
  empty = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  state = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model))
  return nnx.merge(nnx.graphdef(empty), state)


def naive_attend(
  q: Float[Array, "T N H"],
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  cache: ContiguousCache,
  step: Any,
  *,
  layer: int,
  config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], ContiguousCache]:
  """Attention with logits, probabilities and output rounded to the dtype.

  The T tokens are B rows of T / B each, from position `cache.lengths` on.
  """
  B, dtype = cache.lengths.shape[0], q.dtype
  q, k, v = (x.reshape(B, -1, *x.shape[1:]) for x in (q, k, v))
  at = cache.lengths[:, None] + jnp.arange(q.shape[1])  # [B, T / B]
  row = jnp.arange(B)[:, None]
  k_all = cache.k[layer].at[row, at].set(k, mode="drop")
  v_all = cache.v[layer].at[row, at].set(v, mode="drop")
  q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
  scale = jnp.asarray(config.head_dim**-0.5, dtype)
  logits = jnp.einsum("bqkgh,bskh->bkgqs", q, k_all) * scale
  position = jnp.arange(k_all.shape[1])
  seen = position <= at[..., None]
  if config.window is not None:
    seen &= position > at[..., None] - config.window
  logits = logits.astype(jnp.float32)
  logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
  p = jax.nn.softmax(logits, axis=-1).astype(dtype)
  out = jnp.einsum("bkgqs,bskh->bqkgh", p, v_all)
  replace = lambda old, new: (*old[:layer], new, *old[layer + 1 :])
  cache = dataclasses.replace(
    cache, k=replace(cache.k, k_all), v=replace(cache.v, v_all)
  )
  return out.reshape(-1, config.num_heads, config.head_dim), cache


def _naive_prefill(model, cache, tokens, lengths):
  B, S = tokens.shape
  step = _Positions(positions=jnp.tile(jnp.arange(S, dtype=jnp.int32), B))
  logits, cache = model(tokens.reshape(-1), cache, step, attend=naive_attend)
  cache = dataclasses.replace(cache, lengths=lengths)
  return logits.reshape(B, S, -1), cache


def _naive_decode(model, cache, tokens):
  step = _Positions(positions=cache.lengths)
  logits, cache = model(tokens, cache, step, attend=naive_attend)
  return logits, dataclasses.replace(cache, lengths=cache.lengths + 1)
