"""Generation over an ordinary cache: what generation through pages must equal.

One prefill of all prompts, padded to the longest, then one token a row and
step. The steps draw with the keys that `Generator` uses when all prompts fit
one prefill, so sampled tokens agree too, not only greedy ones.
"""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.engine import sampling as sampling_lib
from paged_jax.models import contiguous
from paged_jax.models.transformer import Transformer


def generate(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  eos: Sequence[int] = (),
  seed: int = 0,
  sampling: sampling_lib.Sampling | None = None,
) -> list[tuple[int, ...]]:
  """Continues every prompt; the model's two programs are compiled once a call.

  Args:
    model: the decoder.
    prompts: token ids, B sequences of at least one.
    max_new_tokens: most tokens to add to each, at least 1.
    eos: ids that end a sequence.
    seed: of the sampling.
    sampling: how tokens are drawn; None: greedily.

  Returns:
    The new tokens of each prompt, EOS included.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  padded = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  graph, weights = nnx.split(model)
  options = sampling or sampling_lib.Sampling()

  @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
  def step(function, weights, cache, key, *args):
    logits, cache = function(nnx.merge(graph, weights), cache, *args)
    return sampling_lib.sample(logits, key, options), cache

  cache = contiguous.create_cache(
    model.config,
    num_sequences=len(prompts),
    # The last token is never fed back, so it needs no place.
    max_length=int(lengths.max()) + max_new_tokens - 1,
  )
  keys = [
    jax.random.fold_in(jax.random.key(seed), i) for i in range(max_new_tokens)
  ]
  tokens, cache = step(
    contiguous.prefill, weights, cache, keys[0], padded, jnp.asarray(lengths)
  )
  new = [tokens]
  for key in keys[1:]:
    tokens, cache = step(contiguous.decode, weights, cache, key, tokens)
    new.append(tokens)
  return [_until(eos, row) for row in np.stack(jax.device_get(new), axis=1)]


def _until(eos, row):
  (ends,) = np.isin(row, list(eos)).nonzero()
  return tuple(map(int, row[: ends[0] + 1] if ends.size else row))
