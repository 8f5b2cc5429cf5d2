"""Writes a schedule as a trace for Perfetto (ui.perfetto.dev) or Chrome.

One lane a unit, one slice a task, one arrow a dependency.

Source: the Trace Event Format (events X, M, s, f), Google.
"""

from collections.abc import Iterator
import json
import pathlib
from typing import Any

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import scheduler


def write(
  path: pathlib.Path,
  graph: graph_lib.Graph,
  schedule: scheduler.Schedule,
  units: tuple[int, int],
  title: str,
) -> None:
  """Writes the JSON trace of a schedule, one event a line.

  Args:
    path: of the file, replaced when it is there.
    graph: the tasks.
    schedule: of that graph.
    units: number of matrix and of vector units.
    title: name of the process that holds the lanes.
  """
  with path.open("w") as file:
    file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
    separator = ""
    for event in _events(graph, schedule, units, title):
      file.write(separator + json.dumps(event))
      separator = ",\n"
    file.write("\n]}\n")


def _events(graph, schedule, units, title) -> Iterator[dict[str, Any]]:
  yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}
  for lane, name in enumerate(scheduler.lane_names(units)):
    at = {"ph": "M", "pid": 0, "tid": lane}
    yield {**at, "name": "thread_name", "args": {"name": name}}
    yield {**at, "name": "thread_sort_index", "args": {"sort_index": lane}}

  lane = schedule.lane.tolist()
  start = schedule.start_us.tolist()
  time = schedule.durations_us.tolist()
  for task in range(graph.tasks):
    yield {
      "ph": "X",
      "pid": 0,
      "tid": lane[task],
      "ts": round(start[task], 3),
      "dur": round(time[task], 3),
      "name": graph.name(task),
      "cat": graph_lib.Kind(int(graph.kind[task])).name,
      "args": {"task": task},
    }
  arrow = 0
  for task, sources in enumerate(graph.predecessors.tolist()):
    for source in sources:
      if source < 0:
        continue
      edge = {"pid": 0, "id": arrow, "name": "needs", "cat": "edge"}
      # An arrow belongs to the slice that is open at its time, so it leaves
      # within its source, not at the very end, where the next slice begins.
      leave = start[source] + time[source] / 2
      yield {**edge, "ph": "s", "tid": lane[source], "ts": round(leave, 3)}
      arrive = round(start[task], 3)
      yield {**edge, "ph": "f", "bp": "e", "tid": lane[task], "ts": arrive}
      arrow += 1
