"""Paged attention as a task graph: executed, simulated, traced, compared.

    python -m experiments.simulate --config=configs/simulate.py:tiny

For every case and variant: the graph's counts, the output of the threaded run
against the golden, the run's timing, its replay by the scheduler, and the same
graph on the simulated chip. Then the comparison of variants. Exit code 1 when
an output, a count or a replay is off.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import cli
from experiments.common import records
from paged_jax.ops import inputs as inputs_lib
from paged_jax.simulate import (
  cases,
  pallas_stages,
  runner,
  scheduler,
  stages,
  study,
  timeline,
  trace,
)
from paged_jax.simulate import graph as graph_lib

_CONFIG = config_flags.DEFINE_config_file("config")
_WORKDIR = flags.DEFINE_string(
  "workdir", "out/simulate", "Folder for results, traces and plots."
)
_STAGES = {"jnp": stages, "pallas": pallas_stages}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run does: all of the config, read and checked.

  Attributes:
    runs: cases with overrides.
    execute: sizes of cases that run on threads.
    variants: of each case.
    settings: of each case.
    study: keyword arguments of `study.sweep`.
    trace: write traces.
    timeline: write timelines.
  """

  runs: tuple[cases.Case, ...]
  execute: tuple[str, ...]
  variants: tuple[graph_lib.Variant, ...]
  settings: runner.Settings
  study: dict
  trace: bool
  timeline: bool


def main() -> int:
  plan = make_plan(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  return run(plan, workdir)


def run(plan: Plan, workdir: pathlib.Path) -> int:
  """Runs a plan, prints it, and returns the exit code."""
  written, failures, total = [workdir / "results.jsonl"], [], 0
  with records.fresh(written[0]) as log:
    for case in plan.runs:
      print(_headline(case), flush=True)
      for variant in plan.variants:
        result = runner.run(
          case, variant, plan.settings, case.size in plan.execute
        )
        print(runner.describe(result, plan.settings), flush=True)
        log.write(json.dumps(runner.record(result, plan.settings)) + "\n")
        total += 1
        failures += [f"{case.id} {variant}"] if result.problems else []
        if variant == plan.variants[0]:
          written += _show(result, plan, workdir)
      print()

    points = list(study.sweep(**plan.study))
    for point in points:
      log.write(json.dumps({"study": dataclasses.asdict(point)}) + "\n")
  print("variants compared under the cost model")
  print(study.table(points))
  written.append(workdir / "study.png")
  shape = plan.study["shape"]
  study.plot(
    written[-1],
    points,
    f"variants of the graph, N {shape.query_heads}, K {shape.kv_heads}, "
    f"H {shape.head_dim}, block {shape.block}",
  )

  print()
  for path in written:
    print(f"wrote {path}")
  if failures:
    print(f"FAIL: {len(failures)} of {total} runs: {', '.join(failures)}")
    return 1
  print(f"PASS: {total} of {total} runs")
  return 0


def make_plan(config) -> Plan:
  """Reads the config; raises ValueError with one line for what is wrong."""
  cli.need(config, "study", "chip", like="configs/simulate.py")
  context = config.context and _numbers("context", config.context)
  overrides = {
    name: config[name]
    for name in (
      "batch", "query_heads", "kv_heads", "head_dim", "block", "dtype"
    )
  }
  runs = []
  for name in cases.select(config.case):
    runs += cases.runs(name, context=context, **overrides)
  executed = {"cpu": ("cpu",), "all": ("cpu", "gpu"), "none": ()}
  try:
    chip = scheduler.Chip(**config.chip)
    threads = dataclasses.replace(chip, **config.threads).units
  except TypeError as error:
    raise ValueError(f"config.chip or config.threads: {error}") from error
  inputs_lib.check_int("config.seed", config.seed, 0)
  _one_of("policy", config.policy, scheduler.POLICIES)
  (study_case, *_) = cases.runs(*cases.select(config.study.case)[:1])
  return Plan(
    runs=tuple(runs),
    execute=executed[_one_of("execute", config.execute, executed)],
    variants=_variants(config.variants),
    settings=runner.Settings(
      chip=chip,
      threads=threads,
      policy=config.policy,
      replay_tolerance=config.replay_tolerance,
      stages=_STAGES[_one_of("stages", config.stages, _STAGES)],
      seed=config.seed,
    ),
    study=dict(
      shape=runner.shape_of(study_case),
      chip=dataclasses.replace(
        chip,
        matrix_units=config.study.matrix_units,
        vector_units=config.study.vector_units,
      ),
      variants=_variants(config.study.variants),
      batches=_positive("study.batches", config.study.batches),
      contexts=_positive("study.contexts", config.study.contexts),
      scales=_positive("study.scales", config.study.scales),
      policy=config.policy,
    ),
    trace=config.trace,
    timeline=config.timeline,
  )


def _show(result, plan, workdir) -> list[pathlib.Path]:
  """Writes traces and timeline of a result and returns their paths."""
  case, graph = result.case, result.graph
  views = {}
  if result.threaded:
    views["threads"] = (
      result.threaded.execution.schedule, plan.settings.threads
    )
  views["model"] = result.model.schedule, plan.settings.chip.units
  paths = []
  if plan.trace:
    for name, (schedule, units) in views.items():
      paths.append(workdir / f"{case.id}.{name}.trace.json")
      trace.write(paths[-1], graph, schedule, units, f"{case.id} {name}")
  if plan.timeline:
    paths.append(workdir / f"{case.id}.timeline.png")
    title = f"{case.id}, {graph.variant}: {graph.tasks} tasks"
    timeline.plot(paths[-1], graph, views, title)
  return paths


def _headline(case: cases.Case) -> str:
  low, high = min(case.lengths), max(case.lengths)
  context = f"{low}" if low == high else f"{low}..{high}"
  return (
    f"{case.id}: batch {case.batch}, heads {case.query_heads}/{case.kv_heads},"
    f" head dim {case.head_dim}, block {case.block}, context {context}, "
    f"{case.dtype} ({case.origin})"
  )


def _numbers(name: str, text: str) -> tuple[int, ...]:
  try:
    return tuple(int(word) for word in text.split(","))
  except ValueError:
    raise ValueError(
      f'{name} must be whole numbers with commas, got "{text}"'
    ) from None


def _positive(name: str, values: Sequence[int]) -> tuple[int, ...]:
  values = tuple(values or ())
  if not values or not all(isinstance(v, int) and v > 0 for v in values):
    raise ValueError(f"{name} must be positive whole numbers, got {values}")
  return values


def _one_of(name: str, word: str, known) -> str:
  if word not in known:
    raise ValueError(
      f"{name} must be one of {', '.join(known)}, got {word!r}"
      + cases.did_you_mean(word, known)
    )
  return word


def _variants(text: str) -> tuple[graph_lib.Variant, ...]:
  names = [name.strip() for name in text.split(",")]
  return tuple(graph_lib.parse_variant(name) for name in names)


if __name__ == "__main__":
  cli.run(main, config="configs/simulate.py")
