"""Which shape of the Hopper decode kernel is fastest, geometry by geometry.

Shapes of one geometry share a row of the table (hopper_tuning.table_key). Every
candidate runs on all of them, held against the reference and timed like the
rule's own choice; the row gets the candidate with the least geometric mean of
the time ratios, if that gains enough and it loses on no shape.

What counts is model time where launches are in CUDA graphs, else the kernels'
time (CUPTI): model time of a short kernel would be how fast the host launches.

Tracing is Python and takes longer than timing, so each shape has a process:

    s0    compile |  time, one shape after the other
    s1    compile |        time
    s2    compile |              time
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from typing import Any

from experiments.common import cells, programs, shapes, timing, verify
from experiments.common import problem as problem_lib
from paged_jax.ops import hopper, hopper_tuning
from paged_jax.ops.plan import Geometry

_TILES = (64, 128, 192, 256)
_BUNDLES = (1, 2, 4, 8)
_GAIN = 0.99  # a row is worth its line below this ratio
_LOSS = 1.01  # and no shape may get slower than this
_SHORT_BYTES = 64e6  # of a layer that takes some 20 us
_PATIENCE = 150  # seconds until a process counts as hanging

Row = dict[str, Any]


def geometry(shape: shapes.Shape) -> Geometry:
  """Returns the static facts of a decode shape."""
  return Geometry(
    num_heads=shape.num_heads,
    num_kv_heads=shape.num_kv_heads,
    head_dim=shape.head_dim,
    page_size=shape.page_size,
    dtype=shape.dtype,
    max_query_length=shape.query_tokens,
    causal=True,
    window=shape.window,
    combined=False,
  )


def config(
  shape: shapes.Shape, overrides: Mapping[str, Any]
) -> hopper_tuning.Config:
  """Returns what the rule makes of a shape, with overrides.

  Raises:
    ValueError, NotImplementedError: the overrides do not suit the shape.
  """
  return hopper_tuning.choose(
    geometry(shape),
    shape.batch,
    -(-shape.context // shape.page_size),
    decode=shape.decode,
    overrides=overrides,
  )


def candidates(shape: shapes.Shape) -> list[dict[str, Any]]:
  """Returns overrides of the rule, the rule itself ({}) first.

  The same ones for all shapes of a geometry; some may be what the rule chooses.
  """
  tried: list[dict[str, Any]] = [
    dict(tile=tile, kb=kb) for tile, kb in itertools.product(_TILES, _BUNDLES)
  ]
  tried += [
    dict(tile=tile, stages=n)
    for tile, n in itertools.product(_TILES, (2, 3, 4))
  ]
  if shape.head_dim <= 64:  # more take too many registers for two CTAs
    tried += [dict(tile=64, kb=kb, ctas_per_sm=2) for kb in _BUNDLES]
  if shape.window is not None:  # else the lengths decide, which vary
    tried += [
      dict(cut=cut) for cut in (hopper_tuning.WHOLE, hopper_tuning.EQUAL)
    ]
  return [{}] + [overrides for overrides in tried if _suits(shape, overrides)]


def _suits(shape, overrides):
  try:
    found = config(shape, overrides)
  except (ValueError, NotImplementedError):
    return False
  fits = 2 <= found.stages == overrides.get("stages", found.stages)
  return fits and found.rows <= 64


def run(
  chosen: Sequence[shapes.Shape],
  effort: cells.Effort,
  seed: int,
  *,
  seconds: float = math.inf,
  say: Callable[[str], None] = print,
) -> Iterator[list[Row]]:
  """Yields the rows of every shape: a candidate each, verified and timed.

  Args:
    chosen: the shapes.
    effort: how much work goes into each; steps are those of a short layer.
    seed: of data and page order.
    seconds: no shape is begun when so many have passed.
    say: told what happens meanwhile.
  """
  end = time.monotonic() + seconds
  at_once = max(os.cpu_count() - 1, 1)
  for first in range(0, len(chosen), at_once):
    part = chosen[first : first + at_once]
    workers = [_Worker(shape, effort, seed) for shape in part]
    try:
      for worker in workers:
        worker.receive(say)
        say(f"compiled {worker.shape.name}")
      for worker in workers:
        if time.monotonic() > end:
          say("out of time: start again to go on")
          return
        rows = worker.measure(say)
        if rows:
          yield rows
    finally:
      for worker in workers:
        worker.end()


class _Worker:
  """A process that compiles the programs of a shape, and times when told."""

  def __init__(self, shape, effort, seed):
    self.shape = shape
    # A forked process could not use the GPU, nor jax's threads.
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=_work, args=(theirs, shape, effort, seed), daemon=True
    )
    self._process.start()
    theirs.close()

  def measure(self, say) -> list[Row] | None:
    try:
      self._pipe.send("now")
    except OSError:
      return None
    return self.receive(say)

  def receive(self, say) -> list[Row] | None:
    try:
      if self._pipe.poll(_PATIENCE):
        return self._pipe.recv()
      say(f"failed: {self.shape.name} is silent for {_PATIENCE} s")
    except (EOFError, OSError):
      say(f"failed: {self.shape.name}, see above")
    self.end()
    return None

  def end(self):
    self._process.terminate()
    self._process.join()
    self._pipe.close()


def _work(pipe, shape, effort, seed):
  """What a process does: compile, wait, then time."""
  if shape.bytes > _SHORT_BYTES:
    effort = dataclasses.replace(effort, steps=-(-effort.steps // 4))
  compiled = _compile(shape, effort)
  pipe.send([])
  pipe.recv()
  pipe.send(_measure(shape, effort, seed, *compiled))


def _compile(shape, effort):
  """Returns jobs of the truth and, by distinct config, of the programs."""
  layers = effort.layers(shape)
  spec = problem_lib.specs(shape, layers)
  state = {k: v for k, v in spec.items() if k not in ("query", "k", "v")}

  def compile_(overrides):
    def replan(plan):
      work = hopper.make_plan(
        plan.page_table, plan.lengths, plan.query_starts, plan.geometry,
        overrides=overrides,
      )
      return dataclasses.replace(plan, work=work)

    prepare = programs.ours(shape, "hopper", replan=replan)
    program = programs.chain(
      prepare,
      layers=layers,
      steps=effort.steps,
      rounds=effort.rounds(shape),
    )
    return program.lower(state, spec["query"]).compile()

  with futures.ThreadPoolExecutor(2) as pool:
    truth = cells.compile_ahead(pool, shape, (), effort)
    jobs = {}
    for overrides in candidates(shape):
      key = config(shape, overrides)
      if key not in jobs:
        jobs[key] = pool.submit(compile_, overrides)
  return truth, jobs


def _measure(shape, effort, seed, truth, jobs):
  problem = problem_lib.build(
    shape,
    layers=effort.layers(shape),
    source=problem_lib.RandomSource(seed),
    seed=seed,
    write=truth["write"].result(),
  )
  want, rounded = cells.truth(
    problem, truth["exact"].result(), truth["naive"].result()
  )
  results, calls = {}, {}
  for key, job in jobs.items():
    result = results[key] = dict(status="failed")
    try:
      call = functools.partial(job.result(), problem.state, problem.query)
      verdict = verify.check(call()[0], want, rounded, shape)
      result.update(
        status="ok" if verdict.passed else "wrong", error=verdict.problem
      )
      if verdict.passed:
        calls[key] = call
    except Exception as error:
      result["error"] = cells.one_line(error)
  steps = effort.steps * effort.rounds(shape)
  options = dict(steps=steps, repeats=effort.repeats)
  model = timing.wall(calls, seconds=effort.seconds, **options)
  in_graphs = "enable_command_buffer" in os.environ.get("XLA_FLAGS", "")
  for key, call in calls.items():
    result = results[key]
    result.update(dataclasses.asdict(model[key]))
    result["us"] = result["median_us"]
    kernels = timing.kernels(call, **options)
    if kernels:
      result["kernel_us"] = kernels[0].median_us
      if not in_graphs:
        result["us"] = result["kernel_us"]
  rule = results[config(shape, {})].get("us")
  return [
    _row(shape, overrides, results[config(shape, overrides)], rule)
    for overrides in candidates(shape)
  ]


def _row(shape, overrides, result, rule_us):
  row = dict(
    key=json.dumps([shape.name, overrides]),
    name=shape.name,
    row=hopper_tuning.table_key(geometry(shape), shape.batch),
    set=overrides,
    **result,
  )
  if rule_us and "us" in row:
    row["ratio"] = row["us"] / rule_us
  return row


def table(
  rows: Sequence[Row], old: Sequence[Row], known: Sequence[shapes.Shape]
) -> list[Row]:
  """Returns the rows of the table: what beats the rule, or did so before.

  Args:
    rows: as from `run`.
    old: rows of the table so far; a geometry's stays until all its shapes are
      in `rows`.
    known: all shapes there are.
  """
  wanted: dict[str, set[str]] = {}
  for shape in known:
    key = hopper_tuning.table_key(geometry(shape), shape.batch)
    wanted.setdefault(json.dumps(key), set()).add(shape.name)
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(json.dumps(row["row"]), []).append(row)
  done = {
    key
    for key, group in groups.items()
    if wanted.get(key, set()) <= {row["name"] for row in group}
  }
  result = ("set", "ratio", "shapes")
  kept = [
    row for row in old
    if json.dumps({k: v for k, v in row.items() if k not in result}) not in done
  ]
  return kept + winners([x for x in rows if json.dumps(x["row"]) in done])


def winners(rows: Sequence[Row]) -> list[Row]:
  """Returns the rows of the table: what beats the rule."""
  groups: dict[str, dict[str, list[Row]]] = {}
  for row in rows:
    group = groups.setdefault(json.dumps(row["row"]), {})
    group.setdefault(json.dumps(row["set"]), []).append(row)
  table = []
  for key, group in groups.items():
    names = {row["name"] for tried in group.values() for row in tried}
    scores = {}
    for overrides, tried in group.items():
      ratios = [row["ratio"] for row in tried if "ratio" in row]
      if len(ratios) == len(names) and max(ratios) <= _LOSS:
        scores[overrides] = math.prod(ratios) ** (1 / len(ratios))
    best = min(scores, key=scores.__getitem__, default=None)
    if best is not None and scores[best] < _GAIN:
      table.append({
        **json.loads(key), "set": json.loads(best),
        "ratio": round(scores[best], 3), "shapes": sorted(names),
      })
  return table
