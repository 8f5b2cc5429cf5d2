"""Runs a task graph for real: one thread a unit, the stage kernels jitted.

Each thread stands for one unit: it waits for a task, runs the stage kernel,
waits for the result, and hands the finished task to the dispatcher, which
assigns what follows from it. Nothing is compiled while the clock runs: every
shape of the graph is compiled, and every thread warmed, before.

What is measured. The span of a task begins when it is assigned, which is the
moment at which its last input is there and its unit is free. It ends when its
result is there and its successor is released. So a span holds the launch (the
thread's wake-up, Python's lock, the dispatch of the call) and the kernel, and
between spans a unit waits for other tasks and for nothing else. These are the
times from which a scheduler can predict the run.
"""

import dataclasses
import threading
import time
import types
from typing import Any

from jaxtyping import Float
import numpy as np

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import inputs as inputs_lib
from paged_jax.simulate import programs, scheduler
from paged_jax.simulate import stages as jnp_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """A threaded run.

  Attributes:
    out: attention output, float32; 0 for sequences of length 0.
    schedule: measured spans, see the module.
    launch_us: the part of each span before its kernel was called.
  """

  out: Float[np.ndarray, "B N H"]
  schedule: scheduler.Schedule
  launch_us: Float[np.ndarray, "tasks"]


def execute(
  graph: graph_lib.Graph,
  inputs: inputs_lib.Inputs,
  units: tuple[int, int],
  *,
  priority: list[float] | None = None,
  stages: types.ModuleType = jnp_stages,
) -> Execution:
  """Runs every task of the graph in dependency order on one thread a unit.

  Args:
    graph: made for the lengths and the block of inputs.
    inputs: of one case.
    units: number of matrix and of vector units, one thread each, at least 1.
    priority: see `scheduler.priorities`.
    stages: module of the stage kernels, `stages` or `pallas_stages`.

  Returns:
    Output and measured spans.

  Raises:
    Whatever a stage kernel raises, from its thread.
  """
  calls = programs.Programs(graph, inputs, stages)
  calls.warm_up()
  run = _Run(graph, units, priority, calls)
  threads = [
    threading.Thread(target=run.work, args=(lane,), daemon=True)
    for lane in range(sum(units))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if run.failure:
    raise run.failure

  out = np.zeros(inputs.query.shape, np.float32)
  for task in np.nonzero(graph.successor < 0)[0]:
    out[graph.sequence[task]] = run.values[task][2]
  return Execution(
    out=out,
    schedule=scheduler.Schedule(
      lane=np.array(run.lane, np.int32),
      start_us=(np.array(run.start, np.int64) - run.begun) / 1e3,
      end_us=(np.array(run.end, np.int64) - run.begun) / 1e3,
    ),
    launch_us=(np.array(run.called) - np.array(run.start)) / 1e3,
  )


class _Run:
  """What the threads of one run share, and the loop each of them runs."""

  def __init__(self, graph, units, priority, calls):
    self._before = graph.predecessors.tolist()
    self._calls = calls
    self._dispatcher = scheduler.Dispatcher(graph, units, priority)
    lanes = sum(units)
    self._lock = threading.Lock()
    self._wake = [threading.Condition(self._lock) for _ in range(lanes)]
    self._assigned: list[int | None] = [None] * lanes
    self._gate = threading.Barrier(lanes, action=self._begin)
    self.values: list[Any] = [None] * graph.tasks
    self.lane = [0] * graph.tasks
    # perf_counter_ns of each task.
    self.start, self.called, self.end = ([0] * graph.tasks for _ in range(3))
    self.begun = 0
    self.failure: BaseException | None = None

  def work(self, lane: int) -> None:
    """The life of one unit."""
    try:
      self._calls.warm_up()
      self._gate.wait()
      while (task := self._next(lane)) is not None:
        self.called[task] = time.perf_counter_ns()
        left, right = (
          self.values[p] if p >= 0 else None for p in self._before[task]
        )
        self._finish(lane, task, self._calls.run(task, left, right))
    except BaseException as error:
      with self._lock:
        self.failure = self.failure or error
        self._wake_all()
      self._gate.abort()

  def _begin(self) -> None:
    with self._lock:
      self.begun = time.perf_counter_ns()
      self._assign(self._dispatcher.begin(), self.begun)

  def _next(self, lane: int) -> int | None:
    with self._lock:
      while self._assigned[lane] is None:
        if not self._dispatcher.left or self.failure:
          return None
        self._wake[lane].wait()
      task, self._assigned[lane] = self._assigned[lane], None
      return task

  def _finish(self, lane: int, task: int, value: Any) -> None:
    with self._lock:
      self.values[task] = value
      # Each value has one reader, so it goes when the reader is done.
      for source in self._before[task]:
        if source >= 0:
          self.values[source] = None
      now = time.perf_counter_ns()
      self.lane[task], self.end[task] = lane, now
      self._assign(self._dispatcher.finish(lane, task), now)
      if not self._dispatcher.left:
        self._wake_all()

  def _assign(self, assignments: list[tuple[int, int]], now: int) -> None:
    for lane, task in assignments:
      self._assigned[lane], self.start[task] = task, now
      self._wake[lane].notify()

  def _wake_all(self) -> None:
    for wake in self._wake:
      wake.notify()
