"""Random checkpoints under their public names, and a NumPy float64 decoder.

The decoder is an oracle of its own: whole sequences, no cache, written from
the papers' formulas; it shares no code with the library.
"""

import math

import numpy as np

from paged_jax.models import config as config_lib
from paged_jax.models.rotary import Llama3Scaling, Rope

VARIANTS = {
  "llama3": dict(
    tied=False,
    rope=Rope(theta=1e4, scaling=Llama3Scaling(original_length=16)),
  ),
  "qwen2": dict(qkv_bias=True, rope=Rope(theta=1e6)),
  "qwen3": dict(qk_norm=True, head_dim=16),
  "window": dict(window=5, num_kv_heads=1),
}


def variant(name, **changes):
  """A small config: N 4, K 2, H 8, two layers."""
  sizes = dict(
    vocab_size=96,
    features=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden=40,
    qkv_bias=False,
    qk_norm=False,
  )
  return config_lib.named("tiny", **(sizes | VARIANTS[name] | changes))


def random_tensors(config, seed=0):
  """Returns checkpoint tensors [out, in] float32 of about unit gain."""
  rng = np.random.default_rng(seed)
  F, H = config.features, config.head_dim
  q, kv = config.num_heads * H, config.num_kv_heads * H
  tensors = {}

  def matrix(name, num_out, num_in):
    tensors[name] = rng.normal(size=(num_out, num_in)) / math.sqrt(num_in)

  def vector(name, size, mean):
    tensors[name] = mean + 0.3 * rng.normal(size=size)

  tensors["model.embed_tokens.weight"] = rng.normal(size=(config.vocab_size, F))
  vector("model.norm.weight", F, 1)
  if not config.tied:
    matrix("lm_head.weight", config.vocab_size, F)
  for i in range(config.num_layers):
    at = f"model.layers.{i}."
    vector(at + "input_layernorm.weight", F, 1)
    vector(at + "post_attention_layernorm.weight", F, 1)
    for letter, size in (("q", q), ("k", kv), ("v", kv)):
      matrix(at + f"self_attn.{letter}_proj.weight", size, F)
      if config.qkv_bias:
        vector(at + f"self_attn.{letter}_proj.bias", size, 0)
    if config.qk_norm:
      vector(at + "self_attn.q_norm.weight", H, 1)
      vector(at + "self_attn.k_norm.weight", H, 1)
    matrix(at + "self_attn.o_proj.weight", F, q)
    matrix(at + "mlp.gate_proj.weight", config.hidden, F)
    matrix(at + "mlp.up_proj.weight", config.hidden, F)
    matrix(at + "mlp.down_proj.weight", F, config.hidden)
  return {name: x.astype(np.float32) for name, x in tensors.items()}


def _inverse_frequencies(rope, head_dim):
  """Llama 3.1's rule, written with wavelengths, one pair at a time."""
  result = []
  for i in range(head_dim // 2):
    freq = 1 / rope.theta ** (2 * i / head_dim)
    if (s := rope.scaling) is not None:
      wavelength = 2 * math.pi / freq
      if wavelength > s.original_length / s.low_freq_factor:
        freq /= s.factor
      elif wavelength > s.original_length / s.high_freq_factor:
        smooth = s.original_length / wavelength - s.low_freq_factor
        smooth /= s.high_freq_factor - s.low_freq_factor
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    result.append(freq)
  return np.array(result)


def logits(config, tensors, tokens):
  """Returns [S, vocab] float64 of one sequence of S token ids."""
  w = {name: x.astype(np.float64) for name, x in tensors.items()}
  S, H = len(tokens), config.head_dim
  G = config.num_heads // config.num_kv_heads

  def norm(x, name):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * w[name]

  def project(x, name):
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

  turn = np.exp(
    1j * np.outer(np.arange(S), _inverse_frequencies(config.rope, H))
  )

  def rotate(x):  # [S, heads, H], pairs (i, i + H/2) as complex numbers
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn[:, None]
    return np.concatenate([z.real, z.imag], -1)

  position = np.arange(S)
  seen = position[:, None] >= position
  if config.window is not None:
    seen &= position[:, None] - position < config.window
  x = w["model.embed_tokens.weight"][np.asarray(tokens)]
  for i in range(config.num_layers):
    at = f"model.layers.{i}."
    h = norm(x, at + "input_layernorm.weight")
    q, k, v = (
      project(h, at + f"self_attn.{letter}_proj").reshape(S, -1, H)
      for letter in "qkv"
    )
    if config.qk_norm:
      q = norm(q, at + "self_attn.q_norm.weight")
      k = norm(k, at + "self_attn.k_norm.weight")
    q, k = rotate(q), rotate(k)
    heads = []
    for n in range(config.num_heads):
      scores = q[:, n] @ k[:, n // G].T / math.sqrt(H)
      scores = np.where(seen, scores, -np.inf)
      scores = np.exp(scores - scores.max(-1, keepdims=True))
      heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, n // G])
    x = x + project(np.concatenate(heads, -1), at + "self_attn.o_proj")
    h = norm(x, at + "post_attention_layernorm.weight")
    gate = project(h, at + "mlp.gate_proj")
    up = project(h, at + "mlp.up_proj")
    x = x + project(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")
  head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return norm(x, "model.norm.weight") @ head.T
