"""One shape, several implementations: verified, timed in turn, compared."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
from matplotlib import figure

from experiments.common import ceilings as ceilings_lib
from experiments.common import (
  cells,
  peers,
  programs,
  shapes,
  timing,
  verify,
)
from experiments.common import (
  problem as problem_lib,
)
from paged_jax.ops import implementations
from paged_jax.simulate import cases as words

Row = dict[str, Any]


def select(names: Sequence[str]) -> list[str]:
  """Returns shape names for names and the words all, decode, prefill, cpu.

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
  """Returns implementation names after checking them.

  Raises:
    ValueError: a name is unknown; says the nearest one.
  """
  known = (*implementations.NAMES, *peers.NAMES)
  for name in names:
    if name not in known:
      raise ValueError(
        f"--implementations has {name!r}: pass {', '.join(known)}"
        + words.did_you_mean(name, known)
      )
  return list(names)


def listing() -> str:
  """Returns the stored shapes as a table."""
  lines = [f"{'shape':48}{'heads':>8}{'H':>5}{'KV MB':>8}  best peer, us"]
  for name, shape in shapes.named().items():
    best = _best_peer(name)
    heads = f"{shape.num_heads}/{shape.num_kv_heads}"
    lines.append(
      f"{name:48}{heads:>8}{shape.head_dim:>5}{shape.kv_bytes / 1e6:>8.1f}  "
      + (f"{best[1]:.1f} ({best[0]})" if best else "")
    )
  return "\n".join(lines)


def run(
  shape: shapes.Shape,
  names: Sequence[str],
  *,
  ceilings: ceilings_lib.Ceilings,
  steps: int,
  cold_bytes: int,
  repeats: int,
  seconds: float,
  seed: int,
) -> list[Row]:
  """Verifies and times implementations on one shape.

  Args:
    shape: the call.
    names: of `implementations.NAMES` and `peers.NAMES`.
    ceilings: of this run.
    steps: layers in the timed program.
    cold_bytes: the layers' K and V hold at least this.
    repeats: samples, at least.
    seconds: sampling time of each, at least.
    seed: of data and page order.

  Returns:
    A row for every name; `status` is ok, wrong, failed or unsupported.
  """
  layers = programs.pool_layers(shape, cold_bytes, most=steps)
  source = problem_lib.RandomSource(seed)
  problem = problem_lib.build(shape, layers=layers, source=source, seed=seed)
  dtype = verify.precise_dtype()
  want, rounded = cells.truth(
    problem,
    verify.exact(shape, dtype),
    None if shape.dtype == "float32" else verify.naive(shape),
  )
  rows, calls = [], {}
  for name in names:
    interpret = (
      name in implementations.PALLAS and jax.default_backend() == "cpu"
    )
    cell = cells.Cell(
      group="bench", shape=shape, implementation=name, interpret=interpret
    )
    row = cells.describe(cell, ceilings) | dict(steps=steps, layers=layers)
    rows.append(row)
    try:
      state, prepare = _prepare(name, problem, source, layers, interpret)
      program = programs.chain(
        prepare, layers=layers, steps=1 if interpret else steps
      )
      compiled = program.lower(state, problem.query).compile()
      first, _ = compiled(state, problem.query)
      verdict = verify.check(first, want, rounded, shape)
      row.update(dataclasses.asdict(verdict))
      row.update(status="ok" if verdict.passed else "wrong")
      row["error"] = row.pop("problem")
      if verdict.passed and not interpret:
        calls[name] = (compiled, state)
    except NotImplementedError as error:
      row.update(status="unsupported", error=cells.one_line(error))
    except Exception as error:
      row.update(status="failed", error=cells.one_line(error))
  _time(rows, calls, problem, steps, repeats, seconds)
  return [cells.plain(row) for row in rows]


def _prepare(name, problem, source, layers, interpret):
  if name in peers.NAMES:
    state = peers.state(name, problem, source, layers)
    return state, peers.prepare(name, problem.shape)
  return problem.state, programs.ours(problem.shape, name, interpret or None)


def _time(rows, calls, problem, steps, repeats, seconds):
  model = timing.wall(
    {
      name: functools.partial(compiled, state, problem.query)
      for name, (compiled, state) in calls.items()
    },
    steps=steps, repeats=repeats, seconds=seconds,
  )
  best = _best_peer(problem.shape.name)
  on_same_device = shapes.stored()["device"] == rows[0]["device"]
  for row in rows:
    name = row["implementation"]
    if name not in calls:
      continue
    row |= dataclasses.asdict(model[name])
    row |= cells.rates(model[name].median_us, row)
    if best and on_same_device:
      row.update(best_peer=best[0], best_peer_us=best[1],
                 ratio_to_best_peer=model[name].median_us / best[1])
    compiled, state = calls[name]
    measured = timing.kernels(
      compiled, state, problem.query, steps=steps, repeats=repeats
    )
    if measured is not None:
      row.update(
        kernel_us=measured[0].median_us,
        kernel_iqr_us=measured[0].iqr_us,
        kernels=[[kernel, *rest] for kernel, rest in measured[1].items()],
      )
  for row in rows:  # relative to the first one, of the same rounds
    if row.get("median_us") and rows[0].get("median_us"):
      row["ratio_to_first"] = row["median_us"] / rows[0]["median_us"]


def table(shape: shapes.Shape, rows: Sequence[Row]) -> str:
  """Returns the rows of one shape as text: times, rates, errors, kernels."""
  gpu = any("kernel_us" in row for row in rows)
  lines = [
    f"\n{shape.name}: B={shape.batch} N={shape.num_heads} "
    f"K={shape.num_kv_heads} H={shape.head_dim} p={shape.page_size} "
    f"context {shape.context} ({shape.distribution}), {shape.dtype}, "
    f"{shape.bytes / 1e6:.1f} MB, {shape.flops / 1e9:.2f} GFLOP",
    f"  {'':12}{'model us':>10}{'IQR':>8}"
    + (f"{'kernel us':>11}" if gpu else "")
    + f"{'GB/s':>8}{'TFLOP/s':>9}{'ceiling':>9}{'of bound':>10}"
    + f"{'vs first':>10}{'vs peer':>9}",
  ]
  for row in rows:
    name = row["implementation"]
    if row.get("median_us") is None:
      what = "verified, interpreted" if row["status"] == "ok" else (
        f"{row['status']}: {row['error']}"
      )
      lines.append(f"  {name:12}{what}")
      continue
    peer = row.get("ratio_to_best_peer")
    lines.append(
      f"  {name:12}{row['median_us']:>10.1f}{row['iqr_us']:>8.1f}"
      + (f"{row.get('kernel_us') or float('nan'):>11.1f}" if gpu else "")
      + f"{row['gbps']:>8.0f}{row['tflops']:>9.3g}"
      + f"{100 * row['ceiling_fraction']:>7.1f} %"
      + f"{100 * row['of_bound']:>8.0f} %{row.get('ratio_to_first', 1):>10.2f}"
      + (f"{peer:>9.2f}" if peer else "")
    )
    for kernel, count, us in row.get("kernels", [])[:6]:
      lines.append(f"      {us:>8.2f} us  x{count:<7.3g}{kernel[:60]}")
  best = _best_peer(shape.name)
  if best:
    lines.append(
      f"  stored: {best[1]} us, {best[0]}, on {shapes.stored()['device']}"
    )
  return "\n".join(lines)


def plot(rows: Sequence[Row], workdir: pathlib.Path) -> pathlib.Path | None:
  """Draws the fraction of the ceiling against KV bytes; None if one shape.

  Bytes (batch x context x heads) decide how near a decode kernel can come.
  """
  timed = [row for row in rows if row.get("median_us")]
  if len({row["name"] for row in timed}) < 2:
    return None
  fig = figure.Figure(figsize=(8.4, 4.2), layout="constrained")
  axes = fig.subplots(1, 2, sharey=True)
  for ax, phase, unit, field, scale in (
    (axes[0], "decode", "MB read", "bytes", 1e6),
    (axes[1], "prefill", "GFLOP", "flops", 1e9),
  ):
    names = dict.fromkeys(row["implementation"] for row in timed)
    for name in names:
      mine = sorted(
        (row[field] / scale, row["ceiling_fraction"])
        for row in timed
        if row["implementation"] == name and row["phase"] == phase
      )
      if mine:
        ax.plot(*zip(*mine), "o-", ms=4, lw=1, label=name)
    ax.set(xscale="log", xlabel=unit, title=phase)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
  axes[0].set(ylabel="fraction of the ceiling", ylim=(0, 1.05))
  for ax in axes:
    if ax.lines:
      ax.legend(frameon=False, fontsize=8)
  path = workdir / "bench.png"
  fig.savefig(path, dpi=140)
  return path


def _best_peer(name):
  found = shapes.stored()["shapes"].get(name, {}).get("peers")
  return min(found.items(), key=lambda item: item[1]) if found else None
