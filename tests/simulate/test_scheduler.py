"""Discrete-event simulation, dispatch policies and the cost model."""

import dataclasses
import itertools

import numpy as np
import pytest

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import scheduler, study
from paged_jax.simulate.graph import Kind

CHIP = scheduler.Chip(
  matrix_units=2,
  vector_units=3,
  matrix_gflops=1000.0,
  vector_gflops=100.0,
  matrix_gbps=50.0,
  vector_gbps=20.0,
  launch_us=1.5,
)


def random_graph(seed):
  rng = np.random.default_rng(seed)
  variant = graph_lib.Variant(
    group=int(rng.integers(1, 4)), splits=int(rng.integers(1, 5))
  )
  lengths = rng.integers(0, 12, size=rng.integers(1, 9))
  graph = graph_lib.build(lengths, 1, variant)
  return graph, rng.uniform(0.5, 5.0, graph.tasks), rng


def check(graph, times, schedule, units):
  """Each task once, after its inputs, on a unit of its class, alone there."""
  np.testing.assert_allclose(schedule.durations_us, times)
  for task, sources in enumerate(graph.predecessors):
    for source in sources[sources >= 0]:
      assert schedule.start_us[task] >= schedule.end_us[source]
  is_vector = schedule.lane >= units[0]
  assert (is_vector == (graph.unit == graph_lib.Unit.VECTOR)).all()
  assert schedule.lane.max(initial=0) < sum(units)
  for lane in range(sum(units)):
    mine = np.nonzero(schedule.lane == lane)[0]
    mine = mine[np.argsort(schedule.start_us[mine])]
    assert (
      schedule.start_us[mine[1:]] >= schedule.end_us[mine[:-1]] - 1e-9
    ).all()


def never_idles(graph, schedule, units):
  """A task waits for its inputs or for a unit, and for nothing else."""
  for task, sources in enumerate(graph.predecessors):
    real = sources[sources >= 0]
    ready = schedule.end_us[real].max(initial=0.0)
    start = schedule.start_us[task]
    if start == ready:
      continue
    middle = (ready + start) / 2
    busy = (
      (graph.unit == graph.unit[task])
      & (schedule.start_us <= middle)
      & (schedule.end_us > middle)
    )
    assert busy.sum() == units[graph.unit[task]]


@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_is_valid_and_never_idles(seed):
  graph, times, rng = random_graph(seed)
  units = tuple(int(n) for n in rng.integers(1, 5, size=2))
  for policy in scheduler.POLICIES:
    priority = scheduler.priorities(graph, policy, times)
    schedule = scheduler.simulate(graph, times, units, priority)
    check(graph, times, schedule, units)
    never_idles(graph, schedule, units)
    work = np.bincount(graph.unit, times, minlength=2) / units
    least = max(scheduler.critical_path(graph, times)[0], *work)
    assert least - 1e-9 <= schedule.makespan_us <= times.sum() + 1e-9
    np.testing.assert_allclose(
      schedule.utilisation(units).sum() * schedule.makespan_us, times.sum()
    )


def test_enough_units_reach_the_critical_path():
  graph, times, _ = random_graph(3)
  schedule = scheduler.simulate(graph, times, (graph.tasks, graph.tasks))
  length, path = scheduler.critical_path(graph, times)
  assert schedule.makespan_us == pytest.approx(length)
  assert times[path].sum() == pytest.approx(length)
  for before, after in itertools.pairwise(path):
    assert graph.successor[before] == after


def test_schedule_by_hand():
  # Two blocks, one unit of each class, QK 1, SF 2, PV 3, UP 4 us.
  graph = graph_lib.build(np.array([2]), 1)
  times = np.array([1.0, 2, 3, 4])[graph.kind]
  schedule = scheduler.simulate(
    graph, times, (1, 1), scheduler.priorities(graph, "order", times)
  )
  names = [graph.name(task) for task in range(graph.tasks)]
  start = dict(zip(names, schedule.start_us.tolist()))
  assert start == {
    "QK b0 j0": 0, "QK b0 j1": 1, "SOFTMAX b0 j0": 1, "PV b0 j0": 3,
    "SOFTMAX b0 j1": 3, "PV b0 j1": 6, "UPDATE b0 j0": 6, "UPDATE b0 j1": 10,
  }
  assert schedule.makespan_us == 14


def test_policies_differ_as_described():
  # Sequence 0 has one block, sequence 1 has three; one unit of each class.
  graph = graph_lib.build(np.array([1, 3]), 1)
  times = np.ones(graph.tasks)

  def first_matrix_tasks(policy):
    priority = scheduler.priorities(graph, policy, times)
    schedule = scheduler.simulate(graph, times, (1, 1), priority)
    matrix = np.nonzero(graph.unit == graph_lib.Unit.MATRIX)[0]
    order = matrix[np.argsort(schedule.start_us[matrix])]
    return [graph.name(task) for task in order[:3]]

  # Ready at 2: PV b0 j0 (by graph order first), QKs that came before it.
  assert first_matrix_tasks("order") == ["QK b0 j0", "QK b1 j0", "PV b0 j0"]
  assert first_matrix_tasks("fifo") == ["QK b0 j0", "QK b1 j0", "QK b1 j1"]
  assert first_matrix_tasks("critical")[0] == "QK b1 j0"
  with pytest.raises(ValueError, match="policy must be one of order, fifo"):
    scheduler.priorities(graph, "random", times)


def test_costs_by_hand():
  graph = graph_lib.build(
    np.array([100, 40]), 16, graph_lib.Variant(group=2, splits=2)
  )
  n, k, h, p, e = 6, 2, 32, 16, 2
  flops, moved = scheduler.task_costs(
    graph, query_heads=n, kv_heads=k, head_dim=h, block=p, item_bytes=e
  )
  for task in range(graph.tasks):
    t = int(graph.blocks[task]) * p
    tile = k * h * t * e
    want = {
      Kind.QK: (2 * n * h * t, tile + n * h * e + 4 * n * t),
      Kind.SOFTMAX: (5 * n * t, 4 * n * t + e * n * t + 8 * n),
      Kind.PV: (2 * n * h * t, tile + e * n * t + 4 * n * h),
      Kind.UPDATE: (3 * n * h + 8 * n, 12 * n * (h + 2)),
      Kind.MERGE: (3 * n * h + 8 * n, 12 * n * (h + 2)),
    }[Kind(int(graph.kind[task]))]
    assert (flops[task], moved[task]) == want


def test_model_times():
  graph = graph_lib.build(np.array([1]), 1)
  flops = np.array([1e6, 1e6, 0.0, 0.0])
  moved = np.array([0.0, 0.0, 1e6, 1e6])
  times = scheduler.model_times(graph, CHIP, flops, moved)
  # 1e6 FLOP at 1000 and 100 GFLOP/s; 1e6 bytes at 50 and 20 GB/s; 1.5 us.
  np.testing.assert_allclose(times, [2.5, 11.5, 21.5, 51.5])


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(matrix_units=0), "matrix_units must be at least 1, got 0"),
    (dict(vector_units=-2), "vector_units must be at least 1, got -2"),
    (dict(vector_gflops=0.0), "vector_gflops must be positive, got 0.0"),
    (dict(matrix_gbps=float("nan")), "matrix_gbps must be positive"),
    (dict(launch_us=-1.0), "launch_us must not be negative, got -1.0"),
  ],
)
def test_bad_chip(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CHIP, **change)


def test_production_case_is_scheduled_whole():
  graph = graph_lib.build(np.full(256, 8192), 128)
  assert graph.tasks == 65536
  times = np.array([3.0, 1.0, 2.0, 1.0])[graph.kind]
  schedule = scheduler.simulate(
    graph, times, (24, 48), scheduler.priorities(graph, "order", times)
  )
  check(graph, times, schedule, (24, 48))
  # Matrix-bound: 16384 blocks of 5 us on 24 units, and little besides.
  assert 1 <= schedule.makespan_us / (16384 * 5 / 24) < 1.1


def points(**change):
  shape = study.Shape(
    query_heads=16, kv_heads=1, head_dim=128, block=128, item_bytes=2
  )
  chip = dataclasses.replace(CHIP, matrix_units=1, vector_units=2)
  options = dict(
    variants=tuple(
      map(graph_lib.parse_variant, ("serial", "unroll4", "split8"))
    ),
    batches=(1, 16),
    contexts=(1024, 8192),
    scales=(1, 32),
    policy="order",
  )
  return list(study.sweep(shape, chip, **(options | change)))


def test_study_finds_when_splitting_pays():
  found = {
    (p.matrix_units, p.batch, p.context, p.variant): p.makespan_us
    for p in points()
  }
  assert len(found) == 2 * 2 * 2 * 3
  # One long sequence on many units: the chain is the limit, splitting cuts it.
  assert found[32, 1, 8192, "split8"] < 0.6 * found[32, 1, 8192, "serial"]
  # Units are the limit: a split adds merges and gains next to nothing.
  assert found[1, 16, 8192, "split8"] > 0.95 * found[1, 16, 8192, "serial"]
  # Fewer tasks, fewer launches.
  assert found[1, 16, 8192, "unroll4"] < found[1, 16, 8192, "serial"]


def test_study_table_and_plot(tmp_path):
  found = points(contexts=(1024,))
  lines = study.table(found).splitlines()
  assert len(lines) == 1 + 4 + 1
  assert lines[0].split()[:6] == [
    "units", "batch", "context", "serial", "unroll4", "split8"
  ]
  times = [float(x) for x in lines[-2].split()[3:6]]
  winner = lines[-2].split()[6]
  assert winner == ("serial", "unroll4", "split8")[np.argmin(times)]
  study.plot(tmp_path / "study.png", found, "title")
  assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
