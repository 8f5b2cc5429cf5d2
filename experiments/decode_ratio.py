"""Time of a decode step through pages over one through an ordinary cache.

    python -m experiments.decode_ratio --context=2048 --batch=4

Same model, same tokens, greedy; both caches hold `context` random tokens a row
and the pages are scattered over the pool. The two paths take turns, step by
step, so that whatever else the machine does falls on both. Prints one line and
one JSON object. Random weights of the true sizes by default: a step's time does
not depend on their values.
"""

import functools
import json
import platform
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.common import loading, prefilling, shapes
from paged_jax.cache import page_table as page_table_lib
from paged_jax.engine import steps
from paged_jax.models import config as config_lib
from paged_jax.models import contiguous
from paged_jax.ops import implementations

_SMOLLM2 = "smollm2-135m"
_MODEL = flags.DEFINE_enum(
  "model", _SMOLLM2, config_lib.NAMES, "sizes of random weights"
)
_WEIGHTS = flags.DEFINE_enum(
  "weights", "random", ["random", "smollm2"], "values of the weights"
)
_CONTEXT = flags.DEFINE_integer(
  "context", 2048, "tokens in the cache before the first step", lower_bound=1
)
_BATCH = flags.DEFINE_integer("batch", 4, "rows", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "tokens", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 32, "timed steps", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 3, "untimed steps", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", shapes.DTYPES, "of weights and cache"
)
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation", None, implementations.NAMES,
  "of paged attention; automatic if not given",
)


def load() -> loading.Loaded:
  """Returns the model that the flags name.

  Raises:
    ValueError: they name two.
    FileNotFoundError: the weights are not there.
    ImportError: a library that reads them is not there.
  """
  if _WEIGHTS.value == "smollm2" and _MODEL.value != _SMOLLM2:
    raise ValueError(
      f"--model={_MODEL.value} has no weights of smollm2: pass "
      "--weights=random, or no --model"
    )
  return loading.load(dict(
    name=_MODEL.value,
    weights=_WEIGHTS.value,
    dtype=_DTYPE.value,
    num_layers=None,
  ))


def _paged(model, capacity):
  """Returns tokens -> next tokens, over scattered pages."""
  batch = _BATCH.value
  table, cache = prefilling.scattered(
    model.config, batch, capacity, _PAGE_SIZE.value
  )
  context = jnp.full(batch, _CONTEXT.value, jnp.int32)
  table = page_table_lib.advance(table, context)
  state = [_randomise(cache), table]
  graph, weights = nnx.split(model)
  options = steps.StepOptions(implementation=_IMPLEMENTATION.value)
  step = jax.jit(
    functools.partial(steps.decode, graph=graph, options=options),
    donate_argnames="cache",
  )
  active, key = jnp.ones(batch, bool), jax.random.key(0)

  def run(tokens):
    *state[:], out = step(weights, *state, tokens, active, key)
    return out.next_tokens

  return run


def _contiguous(model, capacity):
  """Returns tokens -> next tokens, over an ordinary cache."""
  graph, weights = nnx.split(model)
  cache = _randomise(
    contiguous.create_cache(
      model.config, num_sequences=_BATCH.value, max_length=capacity
    )
  )
  lengths = jnp.full(_BATCH.value, _CONTEXT.value, jnp.int32)
  state = [contiguous.ContiguousCache(k=cache.k, v=cache.v, lengths=lengths)]

  @functools.partial(jax.jit, donate_argnums=1)
  def step(weights, cache, tokens):
    logits, cache = contiguous.decode(nnx.merge(graph, weights), cache, tokens)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  def run(tokens):
    tokens, state[0] = step(weights, state[0], tokens)
    return tokens

  return run


def _randomise(tree):
  """Unit-variance values in place of the zeros of the caches."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  fill = lambda key, x: (
    jax.random.normal(key, x.shape, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
  )
  return jax.tree.unflatten(structure, map(fill, keys, leaves))


def main() -> None:
  loaded = load()
  model = loaded.model
  capacity = _CONTEXT.value + _WARMUP.value + _STEPS.value
  paths = {
    "paged": _paged(model, capacity),
    "contiguous": _contiguous(model, capacity),
  }
  times = {name: [] for name in paths}
  for i in range(_WARMUP.value + _STEPS.value):
    for name, run in paths.items():
      tokens = jnp.full(_BATCH.value, i % model.config.vocab_size, jnp.int32)
      start = time.perf_counter()
      run(tokens).block_until_ready()
      if i >= _WARMUP.value:
        times[name].append(1e3 * (time.perf_counter() - start))
  median = {name: float(np.median(x)) for name, x in times.items()}
  # The median of the ratios of neighbours, so that slow phases cancel.
  ratio = np.median(np.divide(times["paged"], times["contiguous"]))
  print(
    f"decode {loaded.title}, batch {_BATCH.value}, context {_CONTEXT.value}, "
    f"page {_PAGE_SIZE.value}: paged {median['paged']:.2f} ms, contiguous "
    f"{median['contiguous']:.2f} ms a step, ratio {ratio:.3f}"
  )
  print(
    json.dumps(
      dict(
        experiment="decode_ratio",
        jax=jax.__version__,
        python=platform.python_version(),
        device=jax.devices()[0].device_kind,
        model=loaded.title,
        weights=_WEIGHTS.value,
        dtype=_DTYPE.value,
        batch=_BATCH.value,
        context=_CONTEXT.value,
        page_size=_PAGE_SIZE.value,
        steps=_STEPS.value,
        implementation=_IMPLEMENTATION.value,
        paged_ms=median["paged"],
        contiguous_ms=median["contiguous"],
        ratio=float(ratio),
      )
    )
  )


if __name__ == "__main__":
  cli.run(main)
