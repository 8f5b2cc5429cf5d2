"""Shapes by name, several implementations: verified, timed in turn, compared.

Programs of the next shapes are compiled in threads; nothing is timed meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import os
from typing import Any

import jax

from experiments.common import ceilings as ceilings_lib
from experiments.common import (
  cells,
  peers,
  programs,
  shapes,
  timing,
  verify,
  writing,
)
from experiments.common import problem as problem_lib
from paged_jax.ops import implementations
from paged_jax.ops import plan as plan_lib
from paged_jax.simulate import cases as words

Row = dict[str, Any]


def select(names: Sequence[str]) -> list[str]:
  """Returns shape names for names and the words all, cpu and the phases.

  "mixed" stands for the mixed shapes and their parts.

  Raises:
    ValueError: a name is unknown; says the nearest one.
  """
  known = shapes.named()
  stored = {
    name: shape for name, shape in known.items() if not name.startswith("cpu_")
  }
  groups = {
    "all": list(stored),
    "cpu": [name for name in known if name not in stored],
  }
  for phase in shapes.PHASES:
    groups[phase] = [n for n, shape in stored.items() if shape.phase == phase]
  groups["mixed"] = [
    name for whole in groups["mixed"] for name in (whole, *_parts(whole))
  ]
  chosen: list[str] = []
  for word in names:
    if word not in groups and word not in known:
      raise ValueError(
        f"--shape={word} is unknown: see --list"
        + words.did_you_mean(word, [*known, *groups])
      )
    chosen += groups.get(word, [word])
  return list(dict.fromkeys(chosen))


def check_names(names: Sequence[str]) -> list[str]:
  """Returns implementation names after checking them, each once.

  Raises:
    ValueError: a name or its option is unknown; says the nearest one.
  """
  known = (*implementations.NAMES, *peers.NAMES)
  for name in names:
    first, *options = name.split("+")
    if first not in known:
      raise ValueError(
        f"--implementations has {name!r}: pass {', '.join(known)}"
        + words.did_you_mean(name, known)
      )
    for option in options:
      if first in peers.NAMES:
        raise ValueError(
          f"--implementations has {name!r}: {first} makes no plan, so pass it "
          "without an option"
        )
      if option not in plan_lib.OPTIONS:
        raise ValueError(
          f"--implementations has {name!r}: after a + pass "
          f"{', '.join(plan_lib.OPTIONS)}"
          + words.did_you_mean(option, plan_lib.OPTIONS)
        )
  return list(dict.fromkeys(names))


def listing() -> str:
  """Returns the stored shapes as a table."""
  lines = [f"{'shape':48}{'heads':>8}{'H':>5}{'KV MB':>8}  best peer, us"]
  for name, shape in shapes.named().items():
    best = best_peer(name)
    heads = f"{shape.num_heads}/{shape.num_kv_heads}"
    lines.append(
      f"{name:48}{heads:>8}{shape.head_dim:>5}{shape.kv_bytes / 1e6:>8.1f}  "
      + (f"{best[1]:.1f} ({best[0]})" if best else "")
    )
  return "\n".join(lines)


def default_names(shape: shapes.Shape) -> tuple[str, ...]:
  """Returns the implementations worth comparing on this machine."""
  gpu = jax.default_backend() != "cpu"
  if shape.phase == "write":
    return ("triton", "xla") if gpu else ("xla",)
  return ("hopper", "triton", "jax_pallas", "cudnn") if gpu else (
    "xla", "dense"
  )


def run(
  chosen: Sequence[shapes.Shape],
  names: Sequence[str] | None,
  *,
  ceilings: Mapping[str, ceilings_lib.Ceilings],
  efforts: Mapping[str, cells.Effort],
  seed: int,
) -> Iterator[tuple[shapes.Shape, list[Row]]]:
  """Verifies and times implementations, shape by shape.

  Args:
    chosen: the calls.
    names: of `implementations.NAMES` and `peers.NAMES`; None: the default ones
      of each shape.
    ceilings: of this run, by dtype.
    efforts: how much work goes into a row, by phase.
    seed: of data and page order.

  Yields:
    The shape and a row for every name; `status` is ok, wrong, failed or
    unsupported.
  """
  pool = futures.ThreadPoolExecutor(os.cpu_count())
  try:
    ahead = max((effort.ahead for effort in efforts.values()), default=1)
    for start in range(0, len(chosen), ahead):
      jobs = {}
      for shape in chosen[start : start + ahead]:
        group = [
          _cell(shape, name) for name in names or default_names(shape)
        ]
        limits, work = ceilings[shape.dtype], (shape.bytes, shape.flops)
        effort = efforts[shape.phase].of(
          limits.limit_us(*work), cool=limits.heats(*work)
        )
        jobs[shape] = group, {}, effort
        if shape.phase != "write":
          ours = [c for c in group if c.implementation not in peers.NAMES]
          jobs[shape][1].update(cells.compile_ahead(pool, shape, ours, effort))
      futures.wait([f for _, job, _ in jobs.values() for f in job.values()])
      for shape, (group, job, effort) in jobs.items():
        args = group, effort, ceilings[shape.dtype], seed
        if shape.phase == "write":
          rows = writing.run(*args)
        else:
          rows = _run(*args, pool, job)
        _compare(shape, rows)
        yield shape, [cells.plain(row) for row in rows]
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _cell(shape, name):
  pallas = name.split("+")[0] in implementations.PALLAS
  return cells.Cell(
    group="bench",
    shape=shape,
    implementation=name,
    interpret=pallas and jax.default_backend() == "cpu",
  )


def _run(group, effort, ceilings, seed, pool, jobs):
  shape = group[0].shape
  layers = effort.layers(shape)
  source = problem_lib.RandomSource(seed)
  problem = problem_lib.build(
    shape, layers=layers, source=source, seed=seed,
    write=jobs["write"].result(),
  )
  for cell in group:
    if cell.implementation in peers.NAMES:
      jobs[cell.implementation] = pool.submit(
        _peer, cell.implementation, problem, source, effort
      )
  naive = jobs["naive"].result() if "naive" in jobs else None
  want, rounded = cells.truth(problem, jobs["exact"].result(), naive)
  rows, calls = [], {}
  for cell in group:
    name = cell.implementation
    row = cells.describe(cell, ceilings)
    row |= dict(
      steps=effort.steps, rounds=effort.rounds(shape), layers=layers
    )
    rows.append(row)
    try:
      state, compiled = problem.state, jobs[name].result()
      if name in peers.NAMES:
        state, compiled = compiled
      first, _ = compiled(state, problem.query)
      verdict = verify.check(first, want, rounded, shape)
      row.update(dataclasses.asdict(verdict))
      row.update(status="ok" if verdict.passed else "wrong")
      row["error"] = row.pop("problem")
      if verdict.passed and not cell.interpret:
        calls[name] = functools.partial(compiled, state, problem.query)
    except NotImplementedError as error:
      row.update(status="unsupported", error=cells.one_line(error))
    except Exception as error:
      row.update(status="failed", error=cells.one_line(error))
  steps = effort.steps * effort.rounds(shape)
  futures.wait(list(jobs.values()))  # nothing compiles while times are taken
  options = dict(
    steps=steps,
    repeats=effort.repeats,
    cool=ceilings.heats(shape.bytes, shape.flops),
  )
  model = timing.wall(calls, seconds=effort.seconds, **options)
  for row in rows:
    name = row["implementation"]
    if name in calls:
      row |= cells.timed(model[name], row)
      row |= cells.kernel_times(calls[name], **options)
  return rows


def _peer(name, problem, source, effort):
  """Returns (state, compiled chain); needs the arrays, so it is not ahead."""
  layers = effort.layers(problem.shape)
  state = peers.state(name, problem, source, layers)
  program = programs.chain(
    peers.prepare(name, problem.shape),
    layers=layers,
    steps=effort.steps,
    rounds=effort.rounds(problem.shape),
  )
  return state, program.lower(state, problem.query).compile()


def _compare(shape, rows):
  """Adds what a time is against others': stored ones, the run's first one."""
  best = best_peer(shape.name)
  on_same_device = shapes.stored()["device"] == rows[0]["device"]
  for row in rows:
    if not row.get("median_us"):
      continue
    if best and on_same_device:
      row.update(best_peer=best[0], best_peer_us=best[1],
                 ratio_to_best_peer=row["median_us"] / best[1])
    if rows[0].get("median_us"):
      row["ratio_to_first"] = row["median_us"] / rows[0]["median_us"]


def table(shape: shapes.Shape, rows: Sequence[Row]) -> str:
  """Returns the rows of one shape as text: times, rates, errors, kernels."""
  gpu = any("kernel_us" in row for row in rows)
  lines = [
    f"\n{shape.name}: B={shape.batch} N={shape.num_heads} "
    f"K={shape.num_kv_heads} H={shape.head_dim} p={shape.page_size} "
    f"context {shape.context} ({shape.lengths_in_words}), {shape.dtype}, "
    f"{shape.bytes / 1e6:.1f} MB, {shape.flops / 1e9:.2f} GFLOP",
    f"  {'':24}{'model us':>10}{'IQR':>8}"
    + (f"{'kernel us':>11}" if gpu else "")
    + f"{'GB/s':>8}{'TFLOP/s':>9}{'ceiling':>9}{'of bound':>10}"
    + f"{'vs first':>10}{'vs best peer':>14}",
  ]
  for row in rows:
    name = row["implementation"]
    if row.get("median_us") is None:
      what = "verified, interpreted" if row["status"] == "ok" else (
        f"{row['status']}: {row['error']}"
      )
      lines.append(f"  {name:24}{what}")
      continue
    peer = row.get("ratio_to_best_peer")
    lines.append(
      f"  {name:24}{row['median_us']:>10.1f}{row['iqr_us']:>8.1f}"
      + (f"{row.get('kernel_us') or float('nan'):>11.1f}" if gpu else "")
      + f"{row['gbps']:>8.0f}{row['tflops']:>9.3g}"
      + f"{100 * row['ceiling_fraction']:>7.1f} %"
      + f"{100 * row.get('of_bound', 0):>8.0f} %"
      + f"{row.get('ratio_to_first', 1):>10.2f}"
      + (f"{peer:>14.3f}" if peer else "")
    )
    for kernel, count, us in row.get("kernels", [])[:6]:
      lines.append(f"      {us:>8.2f} us  x{count:<7.3g}{kernel[:60]}")
  best = best_peer(shape.name)
  if best:
    lines.append(
      f"  stored: {best[1]} us, {best[0]}, on {shapes.stored()['device']}"
    )
  return "\n".join(lines)


def sums_of_parts(rows: Sequence[Row]) -> str:
  """Returns how mixed shapes compare with their parts run alone, as text."""
  times = {
    (row["name"], row["implementation"]): row["median_us"]
    for row in rows
    if row.get("median_us")
  }
  lines = []
  for name, implementation in times:
    parts = [times.get((part, implementation)) for part in _parts(name)]
    if parts and all(parts):
      whole = times[name, implementation]
      terms = " + ".join(f"{part:.1f}" for part in parts)
      lines.append(
        f"  {name}, {implementation}: {whole:.1f} us of {terms}: "
        f"{whole / sum(parts):.3f} of the sum"
      )
  if not lines:
    return ""
  return "\n".join(["\nmixed against its parts run alone", *lines, ""])


def best_peer(name: str) -> tuple[str, float] | None:
  """Returns (name, us) of the fastest stored peer on a shape."""
  found = shapes.stored()["shapes"].get(name, {}).get("peers")
  return min(found.items(), key=lambda item: item[1]) if found else None


def _parts(name):
  return shapes.stored()["shapes"].get(name, {}).get("parts", ())
