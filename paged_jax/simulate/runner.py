"""One case under one variant: graph, model, threaded run, and the report."""

import dataclasses
import math
import time
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from paged_jax.simulate import cases, executor, scheduler, study
from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import inputs as inputs_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How cases are run.

  Attributes:
    chip: units and cost model of the simulated chip.
    threads: numbers of matrix and vector units of the threaded run.
    policy: dispatch policy of both, see `scheduler.priorities`.
    replay_tolerance: largest deviation of the simulated from the threaded
      makespan, as a fraction.
    stages: module of the stage kernels.
    seed: of the inputs.
  """

  chip: scheduler.Chip
  threads: tuple[int, int]
  policy: str
  replay_tolerance: float
  stages: types.ModuleType
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threaded:
  """A threaded run against the golden and against its own simulation.

  Attributes:
    comparison: with the golden.
    execution: output and measured spans.
    critical_us: critical path of the measured spans, us.
    replay: deviation of the simulated makespan, a fraction, when every task
      takes its measured span.
    stage_means: the same when every task takes the mean of its stage.
    launch_share: launches, as a fraction of all spans.
  """

  comparison: inputs_lib.Comparison
  execution: executor.Execution
  critical_us: float
  replay: float
  stage_means: float
  launch_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """All there is to know of one case under one variant.

  Attributes:
    case: that was run.
    graph: its tasks.
    build_s: time to build the graph, s.
    model: under the cost model.
    model_s: time to simulate that, s.
    threaded: None when the case was scheduled only.
    problems: what failed; empty is a pass.
  """

  case: cases.Case
  graph: graph_lib.Graph
  build_s: float
  model: study.Model
  model_s: float
  threaded: Threaded | None
  problems: tuple[str, ...]


def run(
  case: cases.Case,
  variant: graph_lib.Variant,
  settings: Settings,
  execute: bool,
) -> Result:
  """Builds, simulates and, if asked to, executes one case.

  Args:
    case: the shape.
    variant: of the graph.
    settings: see `Settings`.
    execute: also run the kernels on threads and compare with the golden.

  Returns:
    The result; what went wrong is in its `problems`, nothing is raised for it.
  """
  started = time.perf_counter()
  graph = graph_lib.build(case.lengths, case.block, variant)
  built = time.perf_counter()
  model = study.model(graph, shape_of(case), settings.chip, settings.policy)
  simulated = time.perf_counter()
  threaded = _execute(case, graph, model, settings) if execute else None
  return Result(
    case=case,
    graph=graph,
    build_s=built - started,
    model=model,
    model_s=simulated - built,
    threaded=threaded,
    problems=tuple(_problems(case, graph, threaded, settings)),
  )


def shape_of(case: cases.Case) -> study.Shape:
  """Returns what the cost model needs of a case."""
  return study.Shape(
    query_heads=case.query_heads,
    kv_heads=case.kv_heads,
    head_dim=case.head_dim,
    block=case.block,
    item_bytes=jnp.dtype(case.dtype).itemsize,
  )


def _execute(case, graph, model, settings) -> Threaded:
  inputs = inputs_lib.make_inputs(case, settings.seed)
  # The policy may look at task times; only the model's are known beforehand.
  priority = scheduler.priorities(
    graph, settings.policy, model.schedule.durations_us
  )
  execution = executor.execute(
    graph,
    inputs,
    settings.threads,
    priority=priority,
    stages=settings.stages,
  )
  spans = execution.schedule.durations_us
  measured = execution.schedule.makespan_us

  def deviation(times):
    simulated = scheduler.simulate(graph, times, settings.threads, priority)
    return simulated.makespan_us / measured - 1 if measured else 0.0

  counts = np.bincount(graph.kind, minlength=len(graph_lib.Kind))
  sums = np.bincount(graph.kind, spans, minlength=len(graph_lib.Kind))
  return Threaded(
    comparison=inputs_lib.compare(
      execution.out,
      inputs_lib.golden(inputs, graph.variant.group),
      atol=case.atol,
      rtol=case.rtol,
    ),
    execution=execution,
    critical_us=scheduler.critical_path(graph, spans)[0],
    replay=deviation(spans),
    stage_means=deviation((sums / np.maximum(counts, 1))[graph.kind]),
    launch_share=float(execution.launch_us.sum() / (spans.sum() or 1.0)),
  )


def _problems(case, graph, threaded, settings):
  if graph.variant == graph_lib.Variant():
    published = case.expected_tasks if case.tasks is None else case.tasks
    if not graph.tasks == published == case.expected_tasks:
      yield f"{graph.tasks} tasks, expected {published}"
    if graph.edges != case.expected_edges:
      yield f"{graph.edges} edges, expected {case.expected_edges}"
  if threaded is None:
    return
  comparison = threaded.comparison
  if not comparison.passed:
    yield f"out: {comparison}"
  if case.out_elements not in (None, comparison.total):
    yield f"{comparison.total} elements, expected {case.out_elements}"
  if not abs(threaded.replay) <= settings.replay_tolerance:
    yield (
      f"replay off by {threaded.replay:+.1%}, allowed "
      f"{settings.replay_tolerance:.0%}"
    )


def describe(result: Result, settings: Settings) -> str:
  """Formats a result as the indented lines that a run prints."""
  graph, model, threaded = result.graph, result.model, result.threaded
  serial = graph.variant == graph_lib.Variant()
  tasks = f" (expected {result.case.expected_tasks})" if serial else ""
  edges = f" (expected {result.case.expected_edges})" if serial else ""
  lines = [
    f"  {graph.variant}: {graph.tasks} tasks{tasks}, {graph.edges} edges"
    f"{edges}, built in {result.build_s * 1e3:.1f} ms"
  ]
  if threaded:
    schedule = threaded.execution.schedule
    lines += [
      f"    out: {threaded.comparison}",
      f"    error    max {threaded.comparison.max_abs:.2e}; allowed "
      f"{result.case.atol:g} + {result.case.rtol:g} |golden|",
      "    threads  "
      + _timing(schedule, threaded.critical_us, settings.threads),
      f"    replay   {_off(threaded.replay)} from each task's time, "
      f"{_off(threaded.stage_means)} from stage means; launches "
      f"{threaded.launch_share:.0%} of busy time",
    ]
  lines.append(
    "    model    "
    + _timing(model.schedule, model.critical_us, settings.chip.units)
    + f"; simulated in {result.model_s * 1e3:.0f} ms"
  )
  lines += [f"    FAIL: {problem}" for problem in result.problems]
  return "\n".join(lines)


def record(result: Result, settings: Settings) -> dict[str, Any]:
  """Returns a result as a JSON object; times in us, ratios as fractions."""
  case, graph, model = result.case, result.graph, result.model
  entry = {
    "case": case.id,
    "origin": case.origin,
    "variant": str(graph.variant),
    "batch": case.batch,
    "query_heads": case.query_heads,
    "kv_heads": case.kv_heads,
    "head_dim": case.head_dim,
    "block": case.block,
    "context_min": min(case.lengths),
    "context_max": max(case.lengths),
    "dtype": case.dtype,
    "tasks": graph.tasks,
    "edges": graph.edges,
    "build_s": result.build_s,
    "model_units": settings.chip.units,
    "model_makespan_us": model.schedule.makespan_us,
    "model_critical_us": model.critical_us,
    "model_busy": [round(float(x), 4) for x in model.busy],
    "model_flops": model.flops,
    "model_bytes": model.moved,
    "model_s": result.model_s,
    "executed": result.threaded is not None,
    "passed": not result.problems,
    "problems": result.problems,
  }
  if threaded := result.threaded:
    schedule = threaded.execution.schedule
    comparison = threaded.comparison
    kinds = [kind for kind in graph_lib.Kind if (graph.kind == kind).any()]
    entry |= {
      "matched": comparison.matched,
      "elements": comparison.total,
      # JSON has no NaN.
      "max_abs_error": (
        comparison.max_abs if math.isfinite(comparison.max_abs) else None
      ),
      "threads": settings.threads,
      "threads_makespan_us": schedule.makespan_us,
      "threads_critical_us": threaded.critical_us,
      "threads_busy": [
        round(float(x), 4) for x in schedule.utilisation(settings.threads)
      ],
      "threads_stage_us": {
        kind.name: float(schedule.durations_us[graph.kind == kind].mean())
        for kind in kinds
      },
      "threads_launch_us": float(threaded.execution.launch_us.mean()),
      "replay_deviation": threaded.replay,
      "stage_means_deviation": threaded.stage_means,
      "launch_share": threaded.launch_share,
    }
  return entry


def _timing(schedule, critical_us, units) -> str:
  matrix, vector = np.split(schedule.utilisation(units), [units[0]])
  return (
    f"{units[0]} matrix + {units[1]} vector: {_time(schedule.makespan_us)}, "
    f"critical path {_time(critical_us)}, busy matrix {matrix.mean():.0%} "
    f"vector {vector.mean():.0%}"
  )


def _off(deviation: float) -> str:
  # Adding 0 turns a rounded -0 into 0.
  return f"{round(deviation, 3) + 0.0:+.1%} off"


def _time(us: float) -> str:
  return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"
