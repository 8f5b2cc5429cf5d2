"""Discrete-event simulation of a task graph on a chip of two unit classes.

Time jumps from one task's end to the next. At each jump the finished task frees
its unit and releases its successor, and the dispatcher hands ready tasks to
free units. The threaded executor is driven by the same dispatcher, so a
simulation fed with its measured task times replays its run.
"""

import dataclasses
import heapq
import itertools

from jaxtyping import Float, Int
import numpy as np

from paged_jax.simulate import graph as graph_lib

POLICIES = ("order", "fifo", "critical")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Units of the chip and the cost model of a task.

      time = launch + max(FLOPs / rate, bytes / bandwidth)

  The rates are those of one unit; units do not slow each other down.

  Attributes:
    matrix_units: number of units for QK and PV.
    vector_units: number of units for softmax, update and merge.
    matrix_gflops: rate of a matrix unit, 1e9 FLOP/s.
    vector_gflops: rate of a vector unit, 1e9 FLOP/s.
    matrix_gbps: bandwidth of a matrix unit, 1e9 bytes/s.
    vector_gbps: bandwidth of a vector unit, 1e9 bytes/s.
    launch_us: fixed time of every task, us.
  """

  matrix_units: int
  vector_units: int
  matrix_gflops: float
  vector_gflops: float
  matrix_gbps: float
  vector_gbps: float
  launch_us: float

  def __post_init__(self):
    for name in ("matrix_units", "vector_units"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {getattr(self, name)}"
        )
    for name in (
      "matrix_gflops",
      "vector_gflops",
      "matrix_gbps",
      "vector_gbps",
    ):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    if not self.launch_us >= 0:
      raise ValueError(f"launch_us must not be negative, got {self.launch_us}")

  @property
  def units(self) -> tuple[int, int]:
    return self.matrix_units, self.vector_units


def lane_names(units: tuple[int, int]) -> tuple[str, ...]:
  """Names of all units, matrix units first: "matrix 0", ..., "vector 0"."""
  return tuple(
    f"{name} {i}"
    for name, count in zip(("matrix", "vector"), units)
    for i in range(count)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When and where each task ran, measured or simulated.

  Attributes:
    lane: unit of each task, matrix units first.
    start_us: from the start of the run.
    end_us: from the start of the run.
  """

  lane: Int[np.ndarray, "tasks"]
  start_us: Float[np.ndarray, "tasks"]
  end_us: Float[np.ndarray, "tasks"]

  @property
  def makespan_us(self) -> float:
    return float(self.end_us.max(initial=0.0))

  @property
  def durations_us(self) -> Float[np.ndarray, "tasks"]:
    return self.end_us - self.start_us

  def utilisation(self, units: tuple[int, int]) -> Float[np.ndarray, "units"]:
    """Returns the busy fraction of each unit over the makespan."""
    busy = np.bincount(self.lane, self.durations_us, minlength=sum(units))
    return busy / (self.makespan_us or 1.0)


class Dispatcher:
  """Who runs what next: ready tasks by policy, free units by number.

  It decides only when a task has finished (and at the start): as long as a unit
  of a class is free and a task of that class is ready, the first task goes to
  the unit with the lowest number. Not thread-safe; callers hold a lock.

  Args:
    graph: the tasks.
    units: number of matrix and of vector units, each at least 1.
    priority: see `priorities`.
  """

  def __init__(
    self,
    graph: graph_lib.Graph,
    units: tuple[int, int],
    priority: list[float] | None,
  ):
    self._class = graph.unit.tolist()
    self._after = graph.successor.tolist()
    self._missing = (graph.predecessors >= 0).sum(1).tolist()
    self._priority = priority
    self._arrivals = itertools.count()
    self._ready: list[list[tuple[float, int]]] = [[], []]
    self._free = [list(range(units[0])), list(range(units[0], sum(units)))]
    self.left = graph.tasks

  def begin(self) -> list[tuple[int, int]]:
    """Returns the first assignments, as (unit, task)."""
    for task, missing in enumerate(self._missing):
      if not missing:
        self._push(task)
    return self._assign()

  def finish(self, lane: int, task: int) -> list[tuple[int, int]]:
    """Takes a finished task and returns the assignments that follow."""
    self.left -= 1
    heapq.heappush(self._free[self._class[task]], lane)
    waiter = self._after[task]
    if waiter >= 0:
      self._missing[waiter] -= 1
      if not self._missing[waiter]:
        self._push(waiter)
    return self._assign()

  def _push(self, task: int) -> None:
    key = self._priority[task] if self._priority else next(self._arrivals)
    heapq.heappush(self._ready[self._class[task]], (key, task))

  def _assign(self) -> list[tuple[int, int]]:
    chosen = []
    for ready, free in zip(self._ready, self._free):
      while ready and free:
        chosen.append((heapq.heappop(free), heapq.heappop(ready)[1]))
    return chosen


def priorities(
  graph: graph_lib.Graph, policy: str, durations_us: Float[np.ndarray, "tasks"]
) -> list[float] | None:
  """Returns what ready tasks are sorted by, smallest first; None is arrival.

  Args:
    graph: the tasks.
    policy: "order" (graph order, so a sequence is finished before the next is
      begun), "fifo" (as tasks become ready) or "critical" (longest remaining
      path first).
    durations_us: of each task, used by "critical".

  Raises:
    ValueError: an unknown policy.
  """
  if policy == "fifo":
    return None
  if policy == "order":
    return list(range(graph.tasks))
  if policy != "critical":
    raise ValueError(
      f"policy must be one of {', '.join(POLICIES)}, got {policy!r}"
    )
  rest = durations_us.tolist()
  for task in range(graph.tasks - 1, -1, -1):
    after = graph.successor[task]
    if after >= 0:
      rest[task] += rest[after]
  return [-time for time in rest]


def task_costs(
  graph: graph_lib.Graph,
  *,
  query_heads: int,
  kv_heads: int,
  head_dim: int,
  block: int,
  item_bytes: int,
) -> tuple[Float[np.ndarray, "tasks"], Float[np.ndarray, "tasks"]]:
  """FLOPs and bytes moved of each task.

  With t = blocks * block tokens, as tasks work on whole blocks, and items of e
  bytes (probabilities too), logits and states in float32:

      QK      2 N H t FLOP     K H t e + N H e + 4 N t bytes
      SF      5 N t            4 N t + N t e + 8 N
      PV      2 N H t          K H t e + N t e + 4 N H
      UP, MG  3 N H + 8 N      12 N (H + 2)

  Args:
    graph: the tasks.
    query_heads: N.
    kv_heads: K.
    head_dim: H.
    block: tokens a block.
    item_bytes: e, of one element of the inputs.

  Returns:
    FLOPs and bytes, float64.
  """
  n, h, e = query_heads, head_dim, item_bytes
  t = graph.blocks.astype(np.float64) * block
  tiles = kv_heads * h * t * e
  one = np.ones_like(t)
  flops = np.stack(
    [2 * n * h * t, 5 * n * t, 2 * n * h * t, (3 * n * h + 8 * n) * one]
  )
  moved = np.stack(
    [
      tiles + n * h * e + 4 * n * t,
      (4 + e) * n * t + 8 * n,
      tiles + n * t * e + 4 * n * h,
      12 * n * (h + 2) * one,
    ]
  )
  # A merge costs what an update costs.
  row = np.minimum(graph.kind, graph_lib.Kind.UPDATE)
  column = np.arange(graph.tasks)
  return flops[row, column], moved[row, column]


def model_times(
  graph: graph_lib.Graph,
  chip: Chip,
  flops: Float[np.ndarray, "tasks"],
  moved: Float[np.ndarray, "tasks"],
) -> Float[np.ndarray, "tasks"]:
  """Task times in us under the cost model of the chip (see `Chip`)."""
  unit = graph.unit
  gflops = np.array([chip.matrix_gflops, chip.vector_gflops])[unit]
  gbps = np.array([chip.matrix_gbps, chip.vector_gbps])[unit]
  # 1e9 a second is 1e3 a microsecond.
  return chip.launch_us + np.maximum(flops / gflops, moved / gbps) / 1e3


def simulate(
  graph: graph_lib.Graph,
  durations_us: Float[np.ndarray, "tasks"],
  units: tuple[int, int],
  priority: list[float] | None = None,
) -> Schedule:
  """Runs the graph on the units, event by event.

  Args:
    graph: the tasks.
    durations_us: time of each task, >= 0.
    units: number of matrix and of vector units, each at least 1.
    priority: see `priorities`.

  Returns:
    The schedule; no unit idles while a task of its class is ready.
  """
  time = durations_us.tolist()
  lane, start = [0] * graph.tasks, [0.0] * graph.tasks
  running: list[tuple[float, int]] = []
  dispatcher = Dispatcher(graph, units, priority)
  now, assigned = 0.0, dispatcher.begin()
  while True:
    for unit, task in assigned:
      lane[task], start[task] = unit, now
      heapq.heappush(running, (now + time[task], task))
    if not running:
      break
    now, task = heapq.heappop(running)
    assigned = dispatcher.finish(lane[task], task)

  begun = np.array(start)
  return Schedule(
    lane=np.array(lane, np.int32), start_us=begun, end_us=begun + durations_us
  )


def critical_path(
  graph: graph_lib.Graph, durations_us: Float[np.ndarray, "tasks"]
) -> tuple[float, list[int]]:
  """The longest chain of dependent tasks: its time in us and its task ids.

  No number of units makes the graph faster than this.
  """
  finish: list[float] = []
  via: list[int] = []
  for time, (a, b) in zip(durations_us.tolist(), graph.predecessors.tolist()):
    at_a, at_b = (finish[p] if p >= 0 else 0.0 for p in (a, b))
    finish.append(time + max(at_a, at_b))
    via.append(b if b >= 0 and at_b > at_a else a)
  if not finish:
    return 0.0, []
  task = max(range(len(finish)), key=finish.__getitem__)
  length, path = finish[task], []
  while task >= 0:
    path.append(task)
    task = via[task]
  return length, path[::-1]
