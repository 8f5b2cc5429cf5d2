"""A verification of the paged model: what is run, compared and concluded."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from jaxtyping import Bool, Int
import numpy as np

from experiments.common import loading, paged_run, standard_run, tolerance
from experiments.common.standard_run import Run
from paged_jax.models.transformer import Transformer
from paged_jax.ops import inputs as inputs_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A verification, checked and ready to run."""

  model: Transformer
  prompts: list[list[int]]
  tables: tuple[paged_run.Tables, ...]
  shared_tokens: int  # tokens that all prompts begin with
  num_steps: int  # decode steps
  page_size: int  # p, tokens
  seed: int  # of the page order
  implementation: str | None
  fault: str | None
  headline: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
  """What the paged path is held against."""

  standard: Run
  fed: Int[np.ndarray, "D B"]  # the token of each decode step and row
  exact: Run | None  # the model in float32, for half precision
  naive: Run | None  # a naive attention, for half precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The verdict over one kind of table."""

  tables: str
  comparisons: list[tolerance.Comparison]
  problem: str  # beside the comparisons

  @property
  def passed(self) -> bool:
    return not self.problem and all(c.passed for c in self.comparisons)

  def describe(self) -> str:
    """Returns the comparisons and PASS or FAIL."""
    lines = [tolerance.table(self.comparisons)]
    if self.problem:
      lines.append(self.problem)
    verdict = "PASS" if self.passed else "FAIL"
    return "\n".join([*lines, f"{self.tables}: {verdict}"])

  def as_dict(self) -> dict[str, Any]:
    """Returns a JSON object."""
    return dict(
      tables=self.tables,
      passed=self.passed,
      problem=self.problem,
      comparisons=[tolerance.as_dict(c) for c in self.comparisons],
    )


def make_plan(config: Mapping[str, Any], fault: str | None = None) -> Plan:
  """Loads the model and makes the prompts; see configs/verify.py.

  Raises:
    ValueError: a field does not fit.
    FileNotFoundError: the weights are not there.
  """
  tables = tuple(paged_run.Tables(name=name) for name in config["tables"])
  lengths = [loading.positive("lengths", n) for n in config["lengths"]]
  shared = loading.positive("shared_tokens", config["shared_tokens"])
  page_size = loading.positive("page_size", config["page_size"])
  num_steps = loading.positive("steps", config["steps"])
  if not tables or not lengths:
    raise ValueError("config.tables and config.lengths need an entry each")
  if min(lengths) <= shared:
    raise ValueError(
      f"config.lengths has {min(lengths)}: every prompt needs more than the "
      f"config.shared_tokens={shared} that all begin with"
    )
  inputs_lib.check_int("config.seed", config["seed"], 0)
  loaded = loading.load(config["model"], seed=config["seed"])
  stream = _stream(loaded, config, shared + sum(lengths))
  prompts, at = [], shared
  for n in lengths:
    prompts.append(stream[:shared] + stream[at : at + n - shared])
    at += n - shared
  return Plan(
    model=loaded.model,
    prompts=prompts,
    tables=tables,
    shared_tokens=shared,
    num_steps=num_steps,
    page_size=page_size,
    seed=config["seed"],
    implementation=config["implementation"],
    fault=fault,
    headline=(
      f"{loaded.title}, {config['model']['dtype']} on {loading.device()}: "
      f"prompts of {', '.join(map(str, lengths))} tokens, {num_steps} decode "
      f"steps, pages of {page_size}" + (f"; broken: {fault}" if fault else "")
    ),
  )


def _stream(loaded, config, size) -> list[int]:
  """Returns `size` tokens, of the text again and again or random."""
  if loaded.tokenizer is None:
    vocab = loaded.model.config.vocab_size
    (tokens,) = loading.random_prompts([size], vocab, config["seed"])
    return tokens
  return np.resize(loaded.tokenizer.encode(config["text"]), size).tolist()


def references(plan: Plan) -> References:
  """Runs the standard path, and for half precision its two bounds."""
  run = lambda model, **options: standard_run.run(
    model, plan.prompts, plan.num_steps, **options
  )
  standard, fed = run(plan.model)
  exact = naive = None
  if plan.model.config.dtype != "float32":
    exact, _ = run(standard_run.in_float32(plan.model), fed=fed)
    naive, _ = run(plan.model, fed=fed, naive=True)
  return References(standard=standard, fed=fed, exact=exact, naive=naive)


def verify(plan: Plan, references: References) -> Iterator[Result]:
  """Runs the paged path; yields the verdict over each kind of table."""
  paged = paged_run.PagedModel(
    model=plan.model, fault=plan.fault, implementation=plan.implementation
  )
  for tables in plan.tables:
    got, computed = paged_run.run(
      paged,
      plan.prompts,
      references.fed,
      tables,
      page_size=plan.page_size,
      shared_tokens=plan.shared_tokens,
      seed=plan.seed,
    )
    yield Result(
      tables=tables.name,
      comparisons=compare(got, references, computed),
      problem=got.problem,
    )


def compare(
  got: Run, references: References, computed: Bool[np.ndarray, "R"]
) -> list[tolerance.Comparison]:
  """Returns the comparisons of a paged run with the standard one.

  Args:
    got: the paged path's.
    references: the standard path's.
    computed: of the R prompt tokens, those whose logits were computed.
  """
  parts = {
    "prefill logits": lambda run: run.prefill[computed],
    "decode logits": lambda run: run.decode,
    "cache K": lambda run: run.k,
    "cache V": lambda run: run.v,
  }
  exact, naive = references.exact, references.naive
  return [
    tolerance.compare(
      name,
      part(got),
      part(references.standard),
      exact=None if exact is None else part(exact),
      naive=None if naive is None else part(naive),
    )
    for name, part in parts.items()
  ]
