"""Models from Hugging Face checkpoints: config.json and *.safetensors.

The model types `llama`, `qwen2` and `qwen3` are known. PyTorch keeps a
projection as [out, in]; ours are [in, out].
"""

from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any

from paged_jax.models import weights
from paged_jax.models.config import ModelConfig
from paged_jax.models.rotary import Llama3Scaling, Rope
from paged_jax.models.transformer import Transformer

_TOP = {
  "model.embed_tokens.weight": ("embed", "embedding"),
  "model.norm.weight": ("norm", "scale"),
  "lm_head.weight": ("head", "embedding"),
}
_LAYER = {
  "input_layernorm": ("attention_norm",),
  "self_attn": ("attention",),
  "post_attention_layernorm": ("mlp_norm",),
  "mlp": ("mlp",),
}
_NAME = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(?:(\w+)\.)?(weight|bias)")


def parse_config(values: dict[str, Any], dtype: str) -> ModelConfig:
  """Returns the config that a config.json states.

  Args:
    values: the parsed file.
    dtype: of weights, activations and cache.

  Raises:
    ValueError: the model type or its rotary scaling is unknown.
  """
  kind = values.get("model_type")
  if kind not in ("llama", "qwen2", "qwen3"):
    raise ValueError(
      f"config.json has model_type {kind!r}: llama, qwen2 and qwen3 are known"
    )
  needed = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size",
  )
  missing = [name for name in needed if name not in values]
  if missing:
    raise ValueError(f"config.json lacks {', '.join(missing)}")
  act = values.get("hidden_act", "silu")
  if act != "silu":
    raise ValueError(f"config.json has hidden_act {act!r}: silu is known")
  num_heads = values["num_attention_heads"]
  # Newer files keep theta and the scaling in one entry.
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
  return ModelConfig(
    vocab_size=values["vocab_size"],
    features=values["hidden_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=values.get("num_key_value_heads", num_heads),
    head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
    hidden=values["intermediate_size"],
    qkv_bias=kind == "qwen2",
    qk_norm=kind == "qwen3",
    tied=values.get("tie_word_embeddings", False),
    norm_epsilon=values.get("rms_norm_eps", 1e-6),
    rope=Rope(theta=theta, scaling=_scaling(rope)),
    window=_window(values),
    dtype=dtype,
  )


def _window(values: dict[str, Any]) -> int | None:
  """The window of all layers; the first `max_window_layers` have none."""
  if not values.get("use_sliding_window"):
    return None
  num_layers, window = values["num_hidden_layers"], values.get("sliding_window")
  kinds, full = values.get("layer_types"), values.get("max_window_layers")
  if window is None or (kinds is None and full is None):
    raise ValueError(
      "config.json has use_sliding_window but lacks sliding_window, or both "
      "layer_types and max_window_layers"
    )
  if kinds is None:
    full = min(full, num_layers)
    kinds = ["full_attention"] * full
    kinds += ["sliding_attention"] * (num_layers - full)
  if len(set(kinds)) > 1:
    raise ValueError(
      f"config.json has layer_types {sorted(set(kinds))}: models whose layers "
      "are all of one kind are known"
    )
  return window if kinds[0] == "sliding_attention" else None


def _scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    raise ValueError(
      f"config.json scales its rotary embedding by {kind!r}: llama3 is known"
    )
  return Llama3Scaling(
    factor=rope["factor"],
    low_freq_factor=rope["low_freq_factor"],
    high_freq_factor=rope["high_freq_factor"],
    original_length=rope["original_max_position_embeddings"],
  )


def load_model(
  folder: str | pathlib.Path, *, dtype: str = "bfloat16"
) -> Transformer:
  """Returns the model of a checkpoint folder.

  Args:
    folder: holds config.json and one or more *.safetensors.
    dtype: of weights, activations and cache.

  Raises:
    FileNotFoundError: the folder lacks a file.
    ImportError: the safetensors library is missing.
    ValueError: the checkpoint does not fit its config, or is of another kind.
  """
  try:
    import safetensors
  except ImportError as error:
    raise weights.require("safetensors", error) from error
  folder = pathlib.Path(folder)
  files = sorted(folder.glob("*.safetensors"))
  if not files or not (folder / "config.json").is_file():
    raise FileNotFoundError(
      f"folder is {str(folder)!r}: it must hold config.json and "
      "*.safetensors; download a checkpoint of Qwen2, Qwen3 or Llama there"
    )
  config = parse_config(_read_json(folder / "config.json"), dtype)
  tensors = {}
  for file in files:
    with safetensors.safe_open(file, framework="flax") as opened:
      tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
  return from_tensors(config, tensors)


def eos_tokens(folder: str | pathlib.Path) -> tuple[int, ...]:
  """Returns the ids that end a text, as a checkpoint folder states them.

  Raises:
    ValueError: neither generation_config.json nor config.json does.
  """
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(folder) / name
    ids = _read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is not None:
      return tuple(ids) if isinstance(ids, list) else (ids,)
  raise ValueError(
    f"{str(folder)!r} states no eos_token_id: add it to config.json"
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error


def from_tensors(
  config: ModelConfig, tensors: Mapping[str, Any]
) -> Transformer:
  """Returns the model of tensors named as in a checkpoint.

  Args:
    config: sizes and dtype; the tensors are cast to it.
    tensors: name -> array.

  Raises:
    ValueError: the tensors do not fit the config.
  """
  arrays = {}
  for name, array in tensors.items():
    if name == "lm_head.weight" and config.tied:
      continue  # some files repeat the embedding
    if name.endswith("rotary_emb.inv_freq"):
      continue  # older files hold what the config says
    where = _where(name)
    arrays[where] = array.T if where[-1] == "kernel" else array
  return weights.assemble(config, arrays)


def _where(name: str) -> tuple[Any, ...]:
  """The place of a checkpoint's tensor in the model."""
  if name in _TOP:
    return _TOP[name]
  match = _NAME.fullmatch(name)
  if match is None or match[2] not in _LAYER:
    raise ValueError(
      f"the checkpoint holds {name!r}, which this model has no place for"
    )
  layer, part, child, kind = match.groups()
  if kind == "weight":
    kind = "kernel" if child and child.endswith("proj") else "scale"
  place = _LAYER[part] + ((child,) if child else ())
  return ("layers", int(layer), *place, kind)
