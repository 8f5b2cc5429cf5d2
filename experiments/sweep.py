"""Sweep paged attention over a grid: verify every cell, time it, report.

    python -m experiments.sweep --config=configs/qwen.py
    python -m experiments.sweep --config=configs/qwen.py:tiny --resume
    python -m experiments.sweep --config=configs/qwen.py --config.seed=1

Output under --workdir (default out/sweep/<config name>): rows.jsonl, the
truth; report.csv, *.png and report.html, drawn from it. Rows are on disk the
moment they exist: Ctrl-C loses nothing, --resume continues, with the same seed,
text and effort. Exit code 1 if a cell failed, 130 if interrupted.
"""

import collections
import dataclasses
import pathlib
import time

from absl import flags
import jax
from ml_collections import config_flags
import tqdm

from experiments import cli
from experiments.common import ceilings as ceilings_lib
from experiments.common import cells as cells_lib
from experiments.common import grid as grid_lib
from experiments.common import records as records_lib
from experiments.common import report, sources

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="A sweep; default configs/qwen.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the output goes; default out/sweep/<config name>."
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Skip the cells that rows.jsonl already holds."
)
_REPORT_ONLY = flags.DEFINE_bool(
  "report_only", False, "Run nothing; draw the report from rows.jsonl."
)


def main() -> int:
  grid = grid_lib.from_config(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value or f"out/sweep/{grid.name}")
  if _REPORT_ONLY.value:
    rows = records_lib.Records(workdir / "rows.jsonl").rows()
    if not rows:
      raise ValueError(f"{workdir}/rows.jsonl has no rows: run the sweep first")
    return _finish(rows, workdir, 0, [])
  return sweep(grid, workdir, resume=_RESUME.value)


def sweep(grid: grid_lib.Grid, workdir: pathlib.Path, *, resume: bool) -> int:
  """Runs the cells of a grid, appends their rows, writes the report.

  Args:
    grid: the sweep.
    workdir: where rows.jsonl and the report go.
    resume: whether to keep the rows that are there and skip their cells.

  Returns:
    The exit code: 0, 1 if a cell is wrong or failed, 130 if interrupted.

  Raises:
    ValueError: no cell runs here, the rows to go on with are another run's, or
      the text does not fit. Nothing is written or set aside then.
  """
  records = records_lib.Records(workdir / "rows.jsonl")
  on_gpu = jax.default_backend() in ("gpu", "cuda")
  scale = grid.gpu if on_gpu else grid.cpu
  cells, elsewhere = grid_lib.expand(grid, on_gpu)
  if not cells:
    kind = "gpu" if on_gpu else "cpu"
    raise ValueError(
      f"no cell of the grid runs on this machine: pass config.{kind}."
      "page_sizes, .ratios, .geometry_page_sizes or .implementations that "
      "leave some"
    )
  keys = {cell.key for cell in cells}
  done = set()
  if resume:
    rows = [row for row in records.rows() if row["key"] in keys]
    _check_recipe(grid_lib.recipe(grid, scale), rows, records.path)
    done = records.finished()
  todo = [cell for cell in cells if cell.key not in done]
  print(
    f"{grid.name} on {jax.devices()[0].device_kind}: {len(todo)} cells to run"
    f", {len(cells) - len(todo)} done before, {len(elsewhere)} need a GPU"
  )
  source = sources.make(grid, scale) if todo else None
  workdir.mkdir(parents=True, exist_ok=True)
  if not resume and (old := records.set_aside()):
    print(f"an earlier run's rows are kept as {old}")
  started = time.perf_counter()
  code = 0
  if todo:
    try:
      _run(todo, records, source, scale, grid_lib.recipe(grid, scale))
    except KeyboardInterrupt:
      print("\ninterrupted: finished cells are kept; go on with --resume")
      code = 130
  rows = [row for row in records.rows() if row["key"] in keys]
  seconds = time.perf_counter() - started
  return _finish(rows, workdir, seconds, elsewhere, code)


def _check_recipe(mine, rows, path) -> None:
  for row in rows:
    # Rows of old hold their seed alone.
    made = row.get("recipe", dict(seed=row["seed"]))
    for name, value in mine.items():
      if (old := made.get(name, value)) != value:
        raise ValueError(
          f"config's {name} is {value!r} but {path} was made with {old!r}: "
          "--resume goes on with the same run only; start without it, or in "
          "another --workdir"
        )


def _run(todo, records, source, scale, recipe):
  ceilings = ceilings_lib.measure(scale.dtype)
  print(
    f"ceilings: read {ceilings.read_gbps:.1f} GB/s, copy "
    f"{ceilings.copy_gbps:.1f} GB/s, {scale.dtype} matmul "
    f"{ceilings.matmul_tflops:.3g} TFLOP/s"
  )
  rows = cells_lib.run(
    todo, source=source, effort=scale.effort, ceilings=ceilings
  )
  with tqdm.tqdm(total=len(todo), unit="cell") as bar:
    for row in rows:
      records.append(row | dict(recipe=recipe))
      bar.update()
      if row["status"] != "ok":
        bar.write(f"{row['status']}: {row['key']}: {row['error']}")


def _finish(rows, workdir, seconds, elsewhere, code=0) -> int:
  counts = collections.Counter(row["status"] for row in rows)
  title = workdir.name
  waiting = [
    dict(key=cell.key, **dataclasses.asdict(cell.shape)) for cell in elsewhere
  ]
  paths = report.write(rows, workdir, title=title, needs_gpu=waiting)
  print(report.summary(rows))
  print(
    ", ".join(f"{n} {status}" for status, n in counts.most_common())
    + f" in {seconds:.0f} s; report: {paths['html']}"
  )
  failed = any(counts[status] for status in cells_lib.FAILED)
  return code or int(failed)


if __name__ == "__main__":
  cli.run(main, config="configs/qwen.py")
