"""Weights from arrays: what every checkpoint reader ends in."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax.numpy as jnp

from paged_jax.models.config import ModelConfig
from paged_jax.models.transformer import Transformer

_INSTALL = "pip install gguf safetensors tokenizers"


def require(module: str, error: ImportError) -> ImportError:
  """Returns the error to raise where an optional library is missing."""
  return ImportError(
    f"reading weights needs the library {module}: {_INSTALL}"
  ).with_traceback(error.__traceback__)


def assemble(
  config: ModelConfig, arrays: Mapping[tuple[Any, ...], Any]
) -> Transformer:
  """Returns a model that holds the given arrays.

  Args:
    config: sizes and dtype; arrays are cast to `config.dtype`.
    arrays: path in the model -> array, such as
      `("layers", 0, "mlp", "up_proj", "kernel")` -> [features, hidden].

  Raises:
    ValueError: an array is missing, superfluous, or of another shape.
  """
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(model)
  flat = dict(nnx.to_flat_state(state))
  dotted = lambda paths: ", ".join(
    sorted(".".join(map(str, path)) for path in paths)[:8]
  )
  if missing := flat.keys() - arrays.keys():
    raise ValueError(
      f"the checkpoint lacks {len(missing)} arrays: {dotted(missing)}; does "
      "the config (biases, norms, tied, num_layers) fit the file?"
    )
  if extra := arrays.keys() - flat.keys():
    raise ValueError(
      f"the checkpoint holds {len(extra)} arrays that the model has no place "
      f"for: {dotted(extra)}; does the config fit the file?"
    )
  for path, variable in flat.items():
    array = jnp.asarray(arrays[path], config.dtype)
    if array.shape != variable.shape:
      raise ValueError(
        f"{dotted([path])} has shape {array.shape} in the checkpoint but "
        f"{variable.shape} in the config: the sizes do not fit"
      )
    flat[path] = variable.replace(array)
  return nnx.merge(graph, nnx.from_flat_state(flat))
