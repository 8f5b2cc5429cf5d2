"""Draws schedules as timelines: one row a unit, one bar a task."""

import pathlib

from matplotlib import collections, figure, patches
import numpy as np

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import scheduler

_COLOURS = {
  graph_lib.Kind.QK: "#1f77b4",
  graph_lib.Kind.SOFTMAX: "#ff7f0e",
  graph_lib.Kind.PV: "#17becf",
  graph_lib.Kind.UPDATE: "#2ca02c",
  graph_lib.Kind.MERGE: "#d62728",
}


def plot(
  path: pathlib.Path,
  graph: graph_lib.Graph,
  schedules: dict[str, tuple[scheduler.Schedule, tuple[int, int]]],
  title: str,
) -> None:
  """Writes a PNG with one panel a schedule of the same graph.

  Args:
    path: of the PNG.
    graph: the tasks.
    schedules: panel heading -> (schedule, its numbers of units).
    title: of the figure.
  """
  rows = [sum(units) for _, units in schedules.values()]
  heights = [0.9 + 0.14 * min(row, 40) for row in rows]
  fig = figure.Figure(figsize=(10, 0.8 + sum(heights)), layout="constrained")
  panels = fig.subplots(len(rows), 1, squeeze=False, height_ratios=heights)
  for axis, (heading, (schedule, units)) in zip(
    panels[:, 0], schedules.items()
  ):
    _panel(axis, graph, schedule, units)
    axis.set_title(heading, fontsize=9, loc="left")
  present = [kind for kind in _COLOURS if (graph.kind == kind).any()]
  fig.legend(
    handles=[
      patches.Patch(color=_COLOURS[kind], label=kind.name) for kind in present
    ],
    loc="outside upper right",
    ncols=max(1, len(present)),
    fontsize=8,
  )
  fig.suptitle(title, fontsize=10, x=0.01, ha="left")
  fig.savefig(path, dpi=130)


def _panel(axis, graph, schedule, units) -> None:
  # Milliseconds read better than five digits of microseconds.
  scale, unit = (1e3, "ms") if schedule.makespan_us > 5e3 else (1.0, "us")
  for kind, colour in _COLOURS.items():
    at = graph.kind == kind
    left, right = schedule.start_us[at] / scale, schedule.end_us[at] / scale
    low, high = schedule.lane[at] - 0.4, schedule.lane[at] + 0.4
    corners = np.stack(
      [
        np.stack([x, y], axis=-1)
        for x, y in ((left, low), (right, low), (right, high), (left, high))
      ],
      axis=1,
    )
    axis.add_collection(
      collections.PolyCollection(
        corners,
        facecolors=colour,
        # Outlines would hide the bars where there are thousands.
        edgecolors="white" if graph.tasks <= 400 else "none",
        linewidths=0.3,
        rasterized=True,
      )
    )
  lanes = scheduler.lane_names(units)
  step = -(-len(lanes) // 24)
  axis.set_yticks(range(0, len(lanes), step), lanes[::step], fontsize=7)
  axis.set_ylim(len(lanes) - 0.4, -0.6)
  axis.set_xlim(0, schedule.makespan_us / scale or 1)
  axis.tick_params(axis="x", labelsize=7)
  axis.set_xlabel(f"time ({unit})", fontsize=8)
