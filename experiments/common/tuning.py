"""Which shape of the Hopper decode kernel is fastest, geometry by geometry.

Shapes of one geometry share a row of the table (hopper_tuning.table_key). Every
candidate runs on all of them, held against the reference and timed like the
rule's own choice; the row gets the candidate with the least geometric mean of
the time ratios, if that gains enough and it loses on no shape.

What counts is the kernels' time (CUPTI): of a short one, model time would
measure how fast the host launches.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import json
import math
import os
from typing import Any

from experiments.common import cells, programs, shapes, timing, verify
from experiments.common import problem as problem_lib
from paged_jax.ops import hopper, hopper_tuning
from paged_jax.ops.plan import Geometry

_TILES = (64, 128, 192, 256)
_BUNDLES = (1, 2, 4, 8)
_GAIN = 0.99  # a row is worth its line below this ratio
_LOSS = 1.01  # and no shape may get slower than this

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


def candidates(shape: shapes.Shape) -> list[dict[str, int]]:
  """Returns overrides of the rule, the rule itself ({}) first."""
  choose = functools.partial(
    hopper_tuning.choose,
    geometry(shape),
    shape.batch,
    -(-shape.context // shape.page_size),
    decode=shape.decode,
  )
  found, kept = [choose(overrides={})], [{}]
  for tile, kb in itertools.product(_TILES, _BUNDLES):
    overrides = dict(tile=tile, kb=kb)
    try:
      config = choose(overrides=overrides)
    except (ValueError, NotImplementedError):
      continue
    if config.stages >= 2 and config.rows <= 64 and config not in found:
      found.append(config)
      kept.append(overrides)
  return kept


def run(
  chosen: Sequence[shapes.Shape], effort: cells.Effort, seed: int
) -> Iterator[Row]:
  """Yields a row for every shape and candidate: verified, timed, compared."""
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for shape in chosen:
      yield from _shape(shape, effort, seed, pool)


def _shape(shape, effort, seed, pool):
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
    program = programs.chain(prepare, layers=layers, steps=effort.steps)
    return program.lower(state, spec["query"]).compile()

  tried = candidates(shape)
  jobs = [pool.submit(compile_, overrides) for overrides in tried]
  problem = problem_lib.build(
    shape, layers=layers, source=problem_lib.RandomSource(seed), seed=seed
  )
  dtype = verify.precise_dtype()
  want, rounded = cells.truth(
    problem, verify.exact(shape, dtype), verify.naive(shape)
  )
  rows, calls = [], {}
  for overrides, job in zip(tried, jobs, strict=True):
    row = dict(
      key=json.dumps([shape.name, overrides]),
      name=shape.name,
      row=hopper_tuning.table_key(geometry(shape), shape.batch),
      set=overrides,
    )
    rows.append(row)
    try:
      compiled = job.result()
      first, _ = compiled(problem.state, problem.query)
      verdict = verify.check(first, want, rounded, shape)
      row.update(status="ok" if verdict.passed else "wrong",
                 error=verdict.problem)
      if verdict.passed:
        calls[row["key"]] = functools.partial(
          compiled, problem.state, problem.query
        )
    except Exception as error:
      row.update(status="failed", error=cells.one_line(error))
  futures.wait(jobs)  # nothing compiles while times are taken
  options = dict(steps=effort.steps, repeats=effort.repeats)
  model = timing.wall(calls, seconds=effort.seconds, **options)
  for row in rows:
    if row["key"] in calls:
      row.update(dataclasses.asdict(model[row["key"]]))
      kernels = timing.kernels(calls[row["key"]], **options)
      row["us"] = kernels[0].median_us if kernels else row["median_us"]
      if "us" in rows[0]:
        row["ratio"] = row["us"] / rows[0]["us"]
    yield row


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
