"""The two compiled programs of generation: a prefill step and a decode step.

    prefill  T packed prompt tokens of any rows -> one new token a row
    decode   one token a row                    -> one new token a row

Pure functions of (weights, cache, table); the caller jits them with the cache
donated, so that the pool is updated in place.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from paged_jax.cache.page_table import PageTable
from paged_jax.cache.pool import Cache
from paged_jax.engine import sampling as sampling_lib
from paged_jax.models import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
  """Static choices of a step."""

  sampling: sampling_lib.Sampling = dataclasses.field(
    default_factory=sampling_lib.Sampling
  )
  plan_options: tuple[str, ...] = ()  # see `models.step.prefill_step`
  implementation: str | None = None
  interpret: bool | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutput:
  """What a step tells: the new tokens, and where the fed ones went."""

  next_tokens: Int[Array, "B"]  # meaningless where not ok
  ok: Bool[Array, "B"]  # whether the row got the pages it needed
  positions: Int[Array, "T"]
  slots: Int[Array, "T"] | Int[Array, "2 T"]


def prefill(
  weights: nnx.State,
  cache: Cache,
  table: PageTable,
  tokens: Int[Array, "T"],
  num_tokens: Int[Array, "B"],
  key: PRNGKeyArray,
  *,
  graph: nnx.GraphDef,
  options: StepOptions,
) -> tuple[Cache, PageTable, StepOutput]:
  """Feeds `num_tokens[b]` tokens of each row, packed; samples after the last.

  Args:
    weights: state of the model.
    cache: pools; donate them.
    table: the table.
    tokens: int32 [T], rows packed one after another, then idle ones.
    num_tokens: int32 [B], tokens a row; 0 sits out.
    key: PRNG key of this step.
    graph: structure of the model (static).
    options: static choices.

  Returns:
    (cache, table, output).
  """
  model = nnx.merge(graph, weights)
  table, step, ok = step_lib.prefill_step(
    table,
    num_tokens,
    model.config.attention,
    total=tokens.shape[0],
    plan_options=options.plan_options,
    implementation=options.implementation,
    interpret=options.interpret,
  )
  last = jnp.maximum(step.query_starts[1:] - 1, 0)
  logits, cache = model(tokens, cache, step, rows=last)
  ok &= num_tokens > 0
  return cache, table, _output(logits, key, step, ok, options)


def decode(
  weights: nnx.State,
  cache: Cache,
  table: PageTable,
  tokens: Int[Array, "B"],
  active: Bool[Array, "B"],
  key: PRNGKeyArray,
  *,
  graph: nnx.GraphDef,
  options: StepOptions,
) -> tuple[Cache, PageTable, StepOutput]:
  """Feeds one token to each active row and samples the next.

  Args: as `prefill`, but tokens int32 [B] (idle ones may be anything) and
    active bool [B].

  Returns:
    (cache, table, output).
  """
  model = nnx.merge(graph, weights)
  table, step, ok = step_lib.decode_step(
    table,
    active,
    model.config.attention,
    plan_options=options.plan_options,
    implementation=options.implementation,
    interpret=options.interpret,
  )
  logits, cache = model(tokens, cache, step)
  return cache, table, _output(logits, key, step, ok, options)


def _output(logits, key, step, ok, options):
  return StepOutput(
    next_tokens=sampling_lib.sample(logits, key, options.sampling),
    ok=ok,
    positions=step.positions,
    slots=step.slots,
  )
