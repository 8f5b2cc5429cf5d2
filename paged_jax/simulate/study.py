"""Which variant of the graph wins, over batch, context and number of units."""

from collections.abc import Iterator
import dataclasses
import itertools
import pathlib

from matplotlib import figure
import numpy as np

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """What all points of a study share.

  Attributes:
    query_heads: N.
    kv_heads: K.
    head_dim: H.
    block: tokens a block.
    item_bytes: of one element of the inputs.
  """

  query_heads: int
  kv_heads: int
  head_dim: int
  block: int
  item_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One simulated decode step.

  Attributes:
    batch: sequences.
    context: tokens of each sequence.
    matrix_units: of the chip.
    vector_units: of the chip.
    variant: of the graph.
    tasks: of the graph.
    makespan_us: under the cost model, us.
    critical_us: critical path, us.
    matrix_busy: mean utilisation of the matrix units, 0 to 1.
    vector_busy: mean utilisation of the vector units, 0 to 1.
  """

  batch: int
  context: int
  matrix_units: int
  vector_units: int
  variant: str
  tasks: int
  makespan_us: float
  critical_us: float
  matrix_busy: float
  vector_busy: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A graph under the cost model of a chip.

  Attributes:
    schedule: simulated.
    critical_us: critical path, us.
    busy: utilisation of each unit, matrix units first.
    flops: of the whole graph.
    moved: bytes of the whole graph.
  """

  schedule: scheduler.Schedule
  critical_us: float
  busy: np.ndarray
  flops: float
  moved: float


def model(
  graph: graph_lib.Graph, shape: Shape, chip: scheduler.Chip, policy: str
) -> Model:
  """Simulates a graph with the times of the chip's cost model."""
  flops, moved = scheduler.task_costs(graph, **dataclasses.asdict(shape))
  times = scheduler.model_times(graph, chip, flops, moved)
  priority = scheduler.priorities(graph, policy, times)
  schedule = scheduler.simulate(graph, times, chip.units, priority)
  return Model(
    schedule=schedule,
    critical_us=scheduler.critical_path(graph, times)[0],
    busy=schedule.utilisation(chip.units),
    flops=float(flops.sum()),
    moved=float(moved.sum()),
  )


def sweep(
  shape: Shape,
  chip: scheduler.Chip,
  *,
  variants: tuple[graph_lib.Variant, ...],
  batches: tuple[int, ...],
  contexts: tuple[int, ...],
  scales: tuple[int, ...],
  policy: str,
) -> Iterator[Point]:
  """Simulates every variant at every combination.

  Args:
    shape: shared by all points.
    chip: smallest chip; its numbers of units are multiplied by the scales.
    variants: of the graph.
    batches: sequences.
    contexts: tokens of each sequence.
    scales: factors on the numbers of units.
    policy: see `scheduler.priorities`.

  Yields:
    Points, variants innermost.
  """
  for scale, batch, context in itertools.product(scales, batches, contexts):
    scaled = dataclasses.replace(
      chip,
      matrix_units=chip.matrix_units * scale,
      vector_units=chip.vector_units * scale,
    )
    for variant in variants:
      graph = graph_lib.build(np.full(batch, context), shape.block, variant)
      result = model(graph, shape, scaled, policy)
      matrix, vector = np.split(result.busy, [scaled.matrix_units])
      yield Point(
        batch=batch,
        context=context,
        matrix_units=scaled.matrix_units,
        vector_units=scaled.vector_units,
        variant=str(variant),
        tasks=graph.tasks,
        makespan_us=result.schedule.makespan_us,
        critical_us=result.critical_us,
        matrix_busy=float(matrix.mean()),
        vector_busy=float(vector.mean()),
      )


def table(points: list[Point]) -> str:
  """Formats a study: one row a combination, one column a variant, in us.

  The winner is the first column within 2 % of the fastest, so that a variant
  wins over a simpler one only by a difference worth having.
  """
  names = list(dict.fromkeys(point.variant for point in points))
  wide = max(9, *map(len, names)) + 1
  lines = [
    f"{'units':>7} {'batch':>5} {'context':>7}"
    + "".join(f"{name:>{wide}}" for name in names)
    + f"  {'winner':<{wide}}gain"
  ]
  for row in _rows(points):
    first = next(iter(row.values()))
    times = {name: point.makespan_us for name, point in row.items()}
    fastest = min(times.values())
    winner = next(n for n in names if times[n] <= 1.02 * fastest)
    gain = times[names[0]] / times[winner]
    units = f"{first.matrix_units}+{first.vector_units}"
    lines.append(
      f"{units:>7} {first.batch:>5} {first.context:>7}"
      + "".join(f"{times[name]:>{wide}.1f}" for name in names)
      + f"  {winner:<{wide}}{gain:.2f}x"
    )
  lines.append(
    "us a decode step; units are matrix+vector; winner: first within 2 % of "
    f"the fastest; gain over {names[0]}"
  )
  return "\n".join(lines)


def plot(path: pathlib.Path, points: list[Point], title: str) -> None:
  """Writes a PNG: speed over the first variant, by context.

  One column of panels a batch, one row a number of units.
  """
  names = list(dict.fromkeys(point.variant for point in points))
  batches = sorted({point.batch for point in points})
  units = sorted({(p.matrix_units, p.vector_units) for p in points})
  fig = figure.Figure(
    figsize=(1 + 2.6 * len(batches), 0.9 + 1.9 * len(units)),
    layout="constrained",
  )
  panels = fig.subplots(
    len(units), len(batches), squeeze=False, sharex=True, sharey=True
  )
  for (i, unit), (j, batch) in itertools.product(
    enumerate(units), enumerate(batches)
  ):
    axis = panels[i, j]
    for name, marker in zip(names, itertools.cycle("os^Dvx")):
      series = [
        (row[name].context, row[names[0]].makespan_us / row[name].makespan_us)
        for row in _rows(points)
        if row[name].batch == batch
        and (row[name].matrix_units, row[name].vector_units) == unit
      ]
      axis.plot(*zip(*series), marker=marker, ms=4, label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)
    axis.set_title(
      f"batch {batch}, {unit[0]}+{unit[1]} units", fontsize=8, loc="left"
    )
    axis.tick_params(labelsize=7)
  for axis in panels[-1]:
    axis.set_xlabel("context (tokens)", fontsize=8)
  fig.supylabel(f"speed over {names[0]}", fontsize=9)
  handles, labels = panels[0, 0].get_legend_handles_labels()
  fig.legend(
    handles, labels, loc="outside lower center", ncols=len(names), fontsize=8
  )
  fig.suptitle(title, fontsize=10, x=0.01, ha="left")
  fig.savefig(path, dpi=130)


def _rows(points: list[Point]) -> list[dict[str, Point]]:
  """Groups points that differ in the variant only."""
  rows: dict[tuple[int, ...], dict[str, Point]] = {}
  for point in points:
    key = (point.matrix_units, point.batch, point.context)
    rows.setdefault(key, {})[point.variant] = point
  return list(rows.values())
