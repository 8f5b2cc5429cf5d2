"""Threaded runs: right results, honest spans, no hangs; and their traces."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.simulate import (
  cases,
  executor,
  inputs,
  pallas_stages,
  runner,
  scheduler,
  stages,
  timeline,
  trace,
)
from paged_jax.simulate import graph as graph_lib
from tests.simulate import test_cases, test_scheduler

UNITS = 2, 2
SETTINGS = runner.Settings(
  chip=test_scheduler.CHIP,
  threads=UNITS,
  policy="order",
  replay_tolerance=0.15,
  stages=stages,
  seed=1,
)
SERIAL = graph_lib.Variant()
RAGGED = dataclasses.replace(
  test_cases.CASE, lengths=(33, 0, 8, 1, 64), dtype="bfloat16"
)


@pytest.mark.parametrize("name", cases.simulated_ids("cpu"))
def test_public_case_passes(name):
  for case in cases.runs(name):
    result = runner.run(case, SERIAL, SETTINGS, execute=True)
    assert not result.problems
    comparison = result.threaded.comparison
    total = case.batch * case.query_heads * case.head_dim
    assert f"out: PASS ({total}/{total} elements matched)" in runner.describe(
      result, SETTINGS
    )
    assert comparison.matched == comparison.total == total
    json.dumps(runner.record(result, SETTINGS), allow_nan=False)


@pytest.mark.parametrize("text", ["unroll3", "split3", "unroll2+split2"])
@pytest.mark.parametrize("policy", scheduler.POLICIES)
def test_variants_pass_on_ragged_lengths(text, policy):
  settings = dataclasses.replace(SETTINGS, policy=policy, threads=(3, 2))
  variant = graph_lib.parse_variant(text)
  result = runner.run(RAGGED, variant, settings, execute=True)
  assert not result.problems
  out = result.threaded.execution.out
  assert (out[1] == 0).all() and out.dtype == np.float32


@pytest.mark.parametrize("text", ["serial", "unroll2+split2"])
def test_pallas_stages_pass(text):
  settings = dataclasses.replace(SETTINGS, stages=pallas_stages)
  variant = graph_lib.parse_variant(text)
  assert not runner.run(RAGGED, variant, settings, execute=True).problems


def test_float32_is_exact_attention():
  case = dataclasses.replace(RAGGED, dtype="float32")
  x = inputs.make_inputs(case, seed=5)
  graph = graph_lib.build(x.lengths, case.block, SERIAL)
  out = executor.execute(graph, x, UNITS).out
  np.testing.assert_allclose(out, test_cases.exact(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("policy", scheduler.POLICIES)
def test_spans_are_a_schedule_that_replays(policy):
  x = inputs.make_inputs(RAGGED)
  graph = graph_lib.build(x.lengths, RAGGED.block, SERIAL)
  priority = scheduler.priorities(graph, policy, np.ones(graph.tasks))
  run = executor.execute(graph, x, (2, 3), priority=priority)
  spans = run.schedule.durations_us
  test_scheduler.check(graph, spans, run.schedule, (2, 3))
  test_scheduler.never_idles(graph, run.schedule, (2, 3))
  assert (run.launch_us > 0).all() and (run.launch_us < spans).all()
  replay = scheduler.simulate(graph, spans, (2, 3), priority)
  assert replay.makespan_us == pytest.approx(run.schedule.makespan_us, rel=0.15)


def test_no_tokens_at_all():
  case = dataclasses.replace(RAGGED, lengths=(0, 0))
  result = runner.run(case, SERIAL, SETTINGS, execute=True)
  assert not result.problems and result.graph.tasks == 0


def broken(**replaced):
  """The stage kernels as a module, with some of them replaced."""
  module = types.ModuleType("broken")
  vars(module).update(vars(stages) | replaced)
  return module


def ignore_tail(logits, live, *, scale, dtype):
  return stages.softmax_prepare(
    jnp.nan_to_num(logits), logits.shape[1], scale=scale, dtype=dtype
  )


def forget_rescale(state, new, *, last):
  m, l, acc = stages.online_update(state, new, last=False)
  acc = state[2] + new[2]
  return m, l, acc / l if last else acc


@pytest.mark.parametrize(
  "stages_of",
  [
    broken(softmax_prepare=ignore_tail),
    broken(online_update=forget_rescale),
    broken(pv_matmul=lambda p, v, live: stages.pv_matmul(p, v, 10**6)),
  ],
  ids=["tail", "rescale", "poison"],
)
def test_wrong_kernel_fails(stages_of):
  settings = dataclasses.replace(SETTINGS, stages=stages_of)
  result = runner.run(RAGGED, SERIAL, settings, execute=True)
  assert [p[:9] for p in result.problems] == ["out: FAIL"]
  assert "out: FAIL (" in runner.describe(result, settings)
  record = runner.record(result, settings)
  assert not record["passed"]
  json.dumps(record, allow_nan=False)


def test_wrong_counts_fail():
  case = dataclasses.replace(RAGGED, tasks=7, out_elements=8)
  result = runner.run(case, SERIAL, SETTINGS, execute=True)
  assert [p.split(",")[1] for p in result.problems] == [
    " expected 7", " expected 8"
  ]


def test_wrong_replay_fails():
  settings = dataclasses.replace(SETTINGS, replay_tolerance=-1.0)
  result = runner.run(RAGGED, SERIAL, settings, execute=True)
  assert [p[:10] for p in result.problems] == ["replay off"]


def test_kernel_error_reaches_the_caller():
  calls = []

  def fails_later(state, new, *, last):
    calls.append(last)
    # Traced for the first shape; an error for the second.
    if len(calls) > 1:
      raise RuntimeError("kernel trouble")
    return stages.online_update(state, new, last=last)

  settings = dataclasses.replace(
    SETTINGS, stages=broken(online_update=fails_later)
  )
  with pytest.raises(RuntimeError, match="kernel trouble"):
    runner.run(RAGGED, SERIAL, settings, execute=True)


def test_error_while_running_stops_all_threads(monkeypatch):
  run = executor.programs.Programs.run

  def fails(self, task, left, right):
    if task == 9:
      raise RuntimeError("unit trouble")
    return run(self, task, left, right)

  monkeypatch.setattr(executor.programs.Programs, "run", fails)
  with pytest.raises(RuntimeError, match="unit trouble"):
    runner.run(RAGGED, SERIAL, SETTINGS, execute=True)


def test_error_in_one_thread_before_the_start_stops_all(monkeypatch):
  calls = []

  def fails_once(self):
    calls.append(1)
    # The first call is the caller's, the others are the threads'.
    if len(calls) == 2:
      raise RuntimeError("warm-up trouble")

  monkeypatch.setattr(executor.programs.Programs, "warm_up", fails_once)
  with pytest.raises(RuntimeError, match="warm-up trouble"):
    runner.run(RAGGED, SERIAL, SETTINGS, execute=True)


@pytest.mark.parametrize("text", ["serial", "split3"])
def test_trace_has_a_slice_a_task_and_an_arrow_an_edge(tmp_path, text):
  graph = graph_lib.build(
    np.array(RAGGED.lengths), 8, graph_lib.parse_variant(text)
  )
  times = np.random.default_rng(0).uniform(1, 9, graph.tasks)
  schedule = scheduler.simulate(graph, times, UNITS)
  path = tmp_path / "trace.json"
  trace.write(path, graph, schedule, UNITS, 'a "title"')
  events = json.loads(path.read_text())["traceEvents"]
  kinds = {ph: [e for e in events if e["ph"] == ph] for ph in "XsfM"}
  slices = kinds["X"]
  assert len(slices) == graph.tasks
  assert len(kinds["s"]) == len(kinds["f"]) == graph.edges
  lanes = [
    e["args"]["name"] for e in kinds["M"] if e["name"] == "thread_name"
  ]
  assert lanes == ["matrix 0", "matrix 1", "vector 0", "vector 1"]
  by_task = {e["args"]["task"]: e for e in slices}
  assert [by_task[i]["name"] for i in range(graph.tasks)] == [
    graph.name(i) for i in range(graph.tasks)
  ]
  edges = [
    (source, task)
    for task in range(graph.tasks)
    for source in graph.predecessors[task]
    if source >= 0
  ]
  for leave, arrive, (source, task) in zip(kinds["s"], kinds["f"], edges):
    assert leave["id"] == arrive["id"]
    a, b = by_task[source], by_task[task]
    assert leave["tid"] == a["tid"] and arrive["tid"] == b["tid"]
    assert a["ts"] <= leave["ts"] < a["ts"] + a["dur"]
    assert arrive["ts"] == b["ts"]


def test_timeline_is_a_picture(tmp_path):
  graph = graph_lib.build(np.array(RAGGED.lengths), 8)
  schedule = scheduler.simulate(graph, np.ones(graph.tasks), UNITS)
  path = tmp_path / "timeline.png"
  timeline.plot(path, graph, {"model": (schedule, UNITS)}, "title")
  assert path.read_bytes().startswith(b"\x89PNG")
