"""A whole model's prefill: through pages, in chunks, and the standard way.

    standard   [B, S] tokens over a contiguous cache, in one call
    paged      B * S packed tokens, in one step
    chunk c    B * c packed tokens a step, ceil(S / c) steps

Each call gets tokens and leaves the logits of every row's last token; pools are
donated from call to call. All paths take turns, so that a busy moment of the
machine hits all alike. A call is a whole model over a whole batch: long enough
for a host clock that waits for its end. On a GPU the kernels of a call are
looked at as well, after the timed runs.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from experiments.common import loading, standard_run, timing, tolerance
from paged_jax.cache import page_table as page_table_lib
from paged_jax.cache import permute
from paged_jax.cache import pool as pool_lib
from paged_jax.models import contiguous
from paged_jax.models import step as step_lib
from paged_jax.models.config import ModelConfig
from paged_jax.models.transformer import Transformer

Call = Callable[[], Float[Array, "B vocab"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is timed, checked and ready to run."""

  model: Transformer
  tokens: Int[np.ndarray, "B S"]
  page_size: int  # p, tokens
  chunks: tuple[int, ...]  # tokens of a row a step
  warmup: int  # calls of each path, untimed
  repeats: int  # timed calls of each path
  implementation: str | None  # of paged_attention
  standard: str  # of jax.nn.dot_product_attention: "xla" or "cudnn"
  headline: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """One path: times of its calls, and whether its logits are right."""

  name: str
  ms: list[float]
  num_tokens: int  # of the whole batch
  logits: tolerance.Comparison | None  # with the standard path's
  # Of one call, on a GPU: {kernel name: (launches, us)}.
  kernels: Mapping[str, tuple[float, float]] | None = None

  def figures(self, standard: "Timing") -> dict[str, Any]:
    """Returns times in ms, tokens/s of the batch, and time / standard's."""
    ms, median = np.array(self.ms), float(np.median(self.ms))
    return dict(
      path=self.name,
      avg_ms=float(ms.mean()),
      min_ms=float(ms.min()),
      max_ms=float(ms.max()),
      median_ms=median,
      tokens_per_s=1e3 * self.num_tokens / median,
      # Neighbours in time are compared, so that slow phases cancel.
      ratio=float(np.median(ms / np.array(standard.ms))),
    )


def make_plan(config: Mapping[str, Any]) -> Plan:
  """Loads the model and draws the tokens; see configs/qwen.py.

  Raises:
    ValueError: a field does not fit.
    FileNotFoundError: the weights are not there.
  """
  section = config["prefill"]
  kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
  scale = section[kind]
  length = loading.positive("length", config["length"])
  page_size = loading.positive("prefill.page_size", section["page_size"])
  chunks = [loading.positive("prefill.chunks", c) for c in section["chunks"]]
  sizes = {
    name: loading.positive(f"prefill.{kind}.{name}", scale[name])
    for name in ("batch", "warmup", "repeats")
  }
  standard = loading.one_of(
    f"prefill.{kind}.standard", scale["standard"], ("xla", "cudnn")
  )
  if standard == "cudnn" and scale["dtype"] == "float32":
    raise ValueError(
      f"config.prefill.{kind}.standard is 'cudnn', which knows half precision "
      "only, and dtype is 'float32': pass standard 'xla'"
    )
  spec = dict(
    name=section["model"],
    weights=section["weights"],
    dtype=scale["dtype"],
    num_layers=scale["num_layers"] if section["weights"] == "random" else None,
  )
  loaded = loading.load(spec, seed=config["seed"])
  vocab = loaded.model.config.vocab_size
  lengths = [length] * sizes["batch"]
  tokens = loading.random_prompts(lengths, vocab, config["seed"])
  return Plan(
    model=loaded.model,
    tokens=np.array(tokens, np.int32),
    page_size=page_size,
    # A chunk of the whole prompt is the paged path itself.
    chunks=tuple(c for c in dict.fromkeys(chunks) if c < length),
    warmup=sizes["warmup"],
    repeats=sizes["repeats"],
    implementation=section["implementation"],
    standard=standard,
    headline=(
      f"{loaded.title}, {spec['dtype']} on {loading.device()}: "
      f"batch {sizes['batch']}, {length} tokens each, pages of {page_size}; "
      f"{sizes['warmup']} warm-up and {sizes['repeats']} timed runs each"
    ),
  )


def run(plan: Plan) -> list[Timing]:
  """Times all paths in turn and compares their logits.

  Returns:
    The standard path, the paged one, then the chunk sizes.
  """
  B, S = plan.tokens.shape
  calls = {"standard": standard_call(plan), "paged": paged_call(plan, S)}
  calls |= {f"chunk {c}": paged_call(plan, c) for c in plan.chunks}
  logits = {name: np.asarray(call()) for name, call in calls.items()}
  exact = naive = None
  if plan.model.config.dtype != "float32":
    exact, naive = _exact(plan), logits["standard"]
  ms = measure(calls, plan.warmup, plan.repeats)
  kernels = {
    name: timing.kernels(call, repeats=3) for name, call in calls.items()
  }
  return [
    Timing(
      name=name,
      ms=ms[name],
      num_tokens=B * S,
      logits=None if name == "standard" else tolerance.compare(
        name, logits[name], logits["standard"], exact=exact, naive=naive
      ),
      kernels=kernels[name] and kernels[name][1],
    )
    for name in calls
  ]


def _exact(plan: Plan) -> Float[np.ndarray, "B vocab"]:
  """Returns the logits of the same weights in float32, and frees its copy."""
  model = standard_run.in_float32(plan.model)
  plan = dataclasses.replace(plan, model=model, standard="xla")
  with jax.default_matmul_precision("highest"):  # no TF32
    return np.asarray(standard_call(plan)())


def measure(
  calls: Mapping[str, Call], warmup: int, repeats: int
) -> dict[str, list[float]]:
  """Returns the ms of each call's timed runs, all calls taking turns."""
  ms = {name: [] for name in calls}
  for i in range(warmup + repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if i >= warmup:
        ms[name].append(1e3 * (time.perf_counter() - start))
  return ms


def standard_call(plan: Plan) -> Call:
  """Returns the prefill over a contiguous cache."""
  B, S = plan.tokens.shape
  graph, weights = nnx.split(plan.model)
  cache = contiguous.create_cache(
    plan.model.config, num_sequences=B, max_length=S
  )
  tokens, lengths = jnp.asarray(plan.tokens), jnp.full(B, S, jnp.int32)

  @functools.partial(jax.jit, donate_argnames="cache")
  def step(weights, cache, tokens, lengths):
    model = nnx.merge(graph, weights)
    return contiguous.prefill(
      model, cache, tokens, lengths, implementation=plan.standard
    )

  def call():
    nonlocal cache
    logits, cache = step(weights, cache, tokens, lengths)
    return logits

  return call


def paged_call(plan: Plan, chunk: int) -> Call:
  """Returns the prefill through scattered pages, `chunk` tokens a row a step.

  Every call starts from the same empty rows, whose pages are reserved.
  """
  graph, weights = nnx.split(plan.model)
  start, cache = scattered(
    plan.model.config, *plan.tokens.shape, plan.page_size
  )
  steps = _packed(plan.tokens, chunk)

  @functools.partial(jax.jit, donate_argnames="cache")
  def step(weights, cache, table, tokens, num_tokens):
    model = nnx.merge(graph, weights)
    table, where, _ = step_lib.prefill_step(
      table,
      num_tokens,
      model.config.attention,
      total=tokens.shape[0],
      implementation=plan.implementation,
    )
    last = where.query_starts[1:] - 1
    logits, cache = model(tokens, cache, where, rows=last)
    return logits, cache, table

  def call():
    nonlocal cache
    table = start
    for tokens, num_tokens in steps:
      logits, cache, table = step(weights, cache, table, tokens, num_tokens)
    return logits

  return call


def scattered(
  config: ModelConfig, batch: int, tokens: int, page_size: int
) -> tuple[page_table_lib.PageTable, pool_lib.Cache]:
  """Returns empty rows, their pages reserved at random places, and a cache.

  Args:
    config: of the model.
    batch: B, rows.
    tokens: room of each row.
    page_size: p, tokens.
  """
  max_pages = -(-tokens // page_size)
  table = page_table_lib.create_page_table(
    num_pages=batch * max_pages,
    page_size=page_size,
    num_sequences=batch,
    max_pages=max_pages,
  )
  table, _ = page_table_lib.reserve(table, jnp.full(batch, tokens, jnp.int32))
  order = np.random.default_rng(0).permutation(table.num_pages)
  cache = pool_lib.create_cache(
    num_layers=config.num_layers,
    num_pages=table.num_pages,
    num_kv_heads=config.num_kv_heads,
    page_size=page_size,
    head_dim=config.head_dim,
    dtype=config.dtype,
  )
  return permute.permute_table(table, jnp.asarray(order)), cache


def _packed(
  tokens: Int[np.ndarray, "B S"], chunk: int
) -> list[tuple[Int[Array, "T"], Int[Array, "B"]]]:
  """Returns (packed tokens, tokens a row) of each step; T = B * chunk."""
  B, S = tokens.shape
  steps = []
  for start in range(0, S, chunk):
    part = tokens[:, start : start + chunk]
    packed = np.zeros(B * chunk, np.int32)
    packed[: part.size] = part.ravel()
    counts = jnp.full(B, part.shape[1], jnp.int32)
    steps.append((jnp.asarray(packed), counts))
  return steps


def table(timings: Sequence[Timing]) -> str:
  """Returns the times and verdicts as text."""
  head = ("", "avg ms", "min ms", "max ms", "median ms", "tokens/s",
          "/ standard")
  lines = ["{:12}{:>10}{:>10}{:>10}{:>11}{:>11}{:>12}".format(*head)]
  for path in timings:
    f = path.figures(timings[0])
    line = (
      f"{path.name:12}{f['avg_ms']:10.2f}{f['min_ms']:10.2f}"
      f"{f['max_ms']:10.2f}{f['median_ms']:11.2f}{f['tokens_per_s']:11.0f}"
      f"{f['ratio']:12.3f}"
    )
    if path.logits is not None:
      problem = path.logits.problem
      line += f"  logits {f'FAIL: {problem}' if problem else 'ok'}"
    lines.append(line)
  return "\n".join(lines)
