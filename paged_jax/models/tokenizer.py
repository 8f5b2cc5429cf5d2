"""Text to token ids and back.

`ByteTokenizer` needs nothing: one id a byte. `BpeTokenizer` wraps the
`tokenizers` library around the vocabulary of a GGUF file or a tokenizer.json.
"""

from collections.abc import Sequence
import pathlib
from typing import Any, Protocol

from paged_jax.models import gguf as gguf_lib
from paged_jax.models import weights

_CONTROL = 3  # llama.cpp's token type of markers such as <|im_end|>
SMOLLM2_SYSTEM = (
  "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)


class Tokenizer(Protocol):
  """What the experiments ask of a tokenizer."""

  eos: tuple[int, ...]  # ids that end a text

  def encode(self, text: str) -> list[int]: ...

  def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255; 256 ends a text."""

  vocab_size = 257
  eos = (256,)

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def decode(self, tokens: Sequence[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


class BpeTokenizer:
  """Byte-level BPE of the `tokenizers` library."""

  def __init__(self, tokenizer: Any, eos: Sequence[int]):
    """Wraps a `tokenizers.Tokenizer`; `eos` are the ids that end a text."""
    self._tokenizer = tokenizer
    self.eos = tuple(eos)

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size()

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def from_gguf(path: str | pathlib.Path) -> BpeTokenizer:
  """Returns the tokenizer in a GGUF file (byte-level BPE, as of GPT-2).

  Raises:
    ValueError: the file's tokenizer is of another kind.
  """
  library = _library()
  reader = gguf_lib.read(path)
  kind = gguf_lib.metadata(reader, "tokenizer.ggml.model")
  split = gguf_lib.metadata(reader, "tokenizer.ggml.pre", "default")
  if kind != "gpt2" or split != "smollm":
    raise ValueError(
      f"the GGUF file has a tokenizer {kind!r}, split {split!r}: gpt2 with "
      "smollm is known; use the tokenizer.json of the model instead"
    )
  tokens = gguf_lib.metadata(reader, "tokenizer.ggml.tokens")
  types = gguf_lib.metadata(reader, "tokenizer.ggml.token_type")
  merges = gguf_lib.metadata(reader, "tokenizer.ggml.merges")
  tokenizer = library.Tokenizer(
    library.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
    )
  )
  # SmolLM splits off every single digit, then as GPT-2 does.
  tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
    [
      library.pre_tokenizers.Digits(individual_digits=True),
      library.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [
      library.AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, types)
      if kind == _CONTROL
    ]
  )
  eos = gguf_lib.metadata(reader, "tokenizer.ggml.eos_token_id")
  return BpeTokenizer(tokenizer, [eos])


def from_json(path: str | pathlib.Path, eos: Sequence[int]) -> BpeTokenizer:
  """Returns the tokenizer of a tokenizer.json.

  Args:
    path: the file.
    eos: ids of the tokens that end a text, such as that of "<|im_end|>".

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the vocabulary lacks an id of `eos`.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"path is {str(path)!r}: there is no such file")
  tokenizer = _library().Tokenizer.from_file(str(path))
  for number in eos:
    if tokenizer.id_to_token(number) is None:
      raise ValueError(
        f"eos is {list(eos)}: {number} is not in the vocabulary of {path}"
      )
  return BpeTokenizer(tokenizer, eos)


def chat_prompt(message: str, system: str = "") -> str:
  """Returns a user's message in the ChatML form of SmolLM2 and Qwen.

  Args:
    message: what the user says.
    system: what the model is told before, as `SMOLLM2_SYSTEM`; "": nothing.
  """
  turn = lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n"
  before = turn("system", system) if system else ""
  return before + turn("user", message) + "<|im_start|>assistant\n"


def _library() -> Any:
  try:
    import tokenizers
  except ImportError as error:
    raise weights.require("tokenizers", error) from error
  return tokenizers
