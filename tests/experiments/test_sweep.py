"""The sweep end to end on a grid of two cells, and all the ways it can end."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from configs import decode, qwen, smollm2
from experiments import sweep
from experiments.common import ceilings, records, report, sources, verify
from experiments.common import grid as grid_lib
from paged_jax.ops import xla

_COMMITTED = (
  pathlib.Path(__file__).parents[2]
  / "experiments/results/h100_sweep_qwen/rows.jsonl"
)
_LIMITS = ceilings.Ceilings(read_gbps=10.0, copy_gbps=5.0, matmul_tflops=0.1)


@pytest.fixture
def quick(monkeypatch):
  """Spares a sweep in this process the seconds that its ceilings take."""
  monkeypatch.setattr(ceilings, "measure", lambda dtype: _LIMITS)
  return monkeypatch


def _grid(**changes):
  config = qwen.get_config("tiny")
  config.phases = ("decode",)
  config.page_sizes = (8,)
  config.cpu.implementations = ("reference", "xla")
  config.update(changes)
  return grid_lib.from_config(config)


def _rows(workdir):
  lines = (workdir / "rows.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _command(*flags):
  return subprocess.run(
    [sys.executable, "-m", "experiments.sweep", *flags],
    capture_output=True, text=True, timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def test_command_verifies_times_reports_and_resumes(tmp_path):
  flags = (
    "--config=configs/qwen.py:tiny", "--config.phases=('decode',)",
    "--config.page_sizes=(8,)", f"--workdir={tmp_path}",
  )
  done = _command(*flags)
  assert done.returncode == 0, done.stderr
  xla_row, triton_row = _rows(tmp_path)
  assert {xla_row["status"], triton_row["status"]} == {"ok"}
  assert xla_row["median_us"] > 0 and 0 < xla_row["ceiling_fraction"]
  assert triton_row["mode"] == "interpret"
  assert "median_us" not in triton_row  # verified, never a speed
  for name in ("jax", "jaxlib", "python", "device", "waste", "bytes", "flops",
               "read_gbps", "max_error", "max_bound", "mean_error", "iqr_us"):
    assert xla_row[name] is not None, name
  html = (tmp_path / "report.html").read_text()
  assert "interpreted, ok" in html and "need a GPU" in html
  assert html.count("data:image/png;base64,") == 2
  assert (tmp_path / "speed_decode.png").read_bytes()[:4] == b"\x89PNG"
  assert len((tmp_path / "report.csv").read_text().splitlines()) == 3
  again = _command(*flags, "--resume")
  assert again.returncode == 0 and "0 cells to run, 2 done" in again.stdout
  assert len(_rows(tmp_path)) == 2


def test_a_failing_cell_is_recorded_and_the_next_one_runs(tmp_path, quick):
  attend = xla.attend

  def broken(*args, **kwargs):
    raise RuntimeError("no such luck")

  quick.setattr(xla, "attend", broken)
  grid = _grid(cpu=dict(implementations=("xla", "reference")))
  assert sweep.sweep(grid, tmp_path, resume=False) == 1
  failed, fine = _rows(tmp_path)
  assert failed["status"] == "failed"
  assert failed["error"] == "RuntimeError: no such luck"
  assert fine["status"] == "ok"
  assert "no such luck" in (tmp_path / "report.html").read_text()
  quick.setattr(xla, "attend", attend)  # mended: just this cell runs again
  assert sweep.sweep(grid, tmp_path, resume=True) == 0
  assert [row["status"] for row in _rows(tmp_path)] == ["failed", "ok", "ok"]


def test_a_nan_is_wrong_and_is_not_timed(tmp_path, quick):
  attend = xla.attend

  def poisoned(inputs, **kwargs):
    out, lse = attend(inputs, **kwargs)
    return out.at[1, 2, 3].set(float("nan")), lse

  quick.setattr(xla, "attend", poisoned)
  grid = _grid(cpu=dict(implementations=("xla",)))
  assert sweep.sweep(grid, tmp_path, resume=False) == 1
  (row,) = _rows(tmp_path)
  assert row["status"] == "wrong" and "median_us" not in row
  assert row["error"] == "1 elements are NaN or Inf, the first at [1, 2, 3]"


def test_what_an_implementation_cannot_do_is_no_failure(tmp_path, quick):
  def refuse(*args, **kwargs):
    raise NotImplementedError("not on Sundays")

  quick.setattr(xla, "attend", refuse)
  grid = _grid(cpu=dict(implementations=("xla",)))
  assert sweep.sweep(grid, tmp_path, resume=False) == 0
  assert _rows(tmp_path)[0]["status"] == "unsupported"
  assert "not on Sundays" in (tmp_path / "report.html").read_text()


def test_ctrl_c_keeps_what_is_done(tmp_path, quick, request):
  # A shell's background jobs are begun with the signal ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  check, calls = verify.check, []

  def interrupted(*args):
    calls.append(args)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return check(*args)

  quick.setattr(verify, "check", interrupted)
  assert sweep.sweep(_grid(), tmp_path, resume=False) == 130
  assert [row["implementation"] for row in _rows(tmp_path)] == ["reference"]
  assert (tmp_path / "report.html").exists()
  quick.setattr(verify, "check", check)
  assert sweep.sweep(_grid(), tmp_path, resume=True) == 0
  assert [r["implementation"] for r in _rows(tmp_path)] == ["reference", "xla"]


def test_a_fresh_start_keeps_the_old_rows_aside(tmp_path, quick):
  (tmp_path / "rows.jsonl").write_text('{"key": "old", "status": "ok"}\n')
  grid = _grid(cpu=dict(implementations=("reference",)))
  assert sweep.sweep(grid, tmp_path, resume=False) == 0
  (row,) = _rows(tmp_path)
  assert row["recipe"] == grid_lib.recipe(grid, grid.cpu)
  assert "old" in (tmp_path / "rows.1.jsonl").read_text()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(seed=7), "seed is 7 but .*rows.jsonl was made with 0"),
    (dict(text="other.txt"), "text is 'other.txt' but .* made with ''"),
    (dict(cpu=dict(seconds=1.0)), "seconds is 1.0 but .* made with 0.02"),
    (dict(cpu=dict(cold_mb=64)), "cold_mb is 64 but .* made with 1"),
  ],
)
def test_resume_refuses_another_runs_rows(tmp_path, changes, message):
  grid = _grid()
  recipe = grid_lib.recipe(grid, grid.cpu)
  for cell in grid_lib.expand(grid, on_gpu=False)[0]:
    records.Records(tmp_path / "rows.jsonl").append(
      dict(key=cell.key, status="ok", seed=0, recipe=recipe)
    )
  before = _rows(tmp_path)
  with pytest.raises(ValueError, match=message):
    sweep.sweep(_grid(**changes), tmp_path, resume=True)
  assert _rows(tmp_path) == before
  assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_without_a_recipe_are_read_and_held_to_their_seed(tmp_path):
  rows = records.Records(_COMMITTED).rows()
  for row in rows:
    row.pop("recipe", None)
  grid = grid_lib.from_config(qwen.get_config())
  recipe = grid_lib.recipe(grid, grid.gpu)
  sweep._check_recipe(recipe, rows, _COMMITTED)
  with pytest.raises(ValueError, match="seed is 1 but .* made with 0"):
    sweep._check_recipe(recipe | dict(seed=1), rows, _COMMITTED)
  mixed = [*rows[:2], rows[2] | dict(recipe=recipe)]
  assert sweep._finish(mixed, tmp_path, 0, []) == 0
  assert len((tmp_path / "report.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("why", ["no cell", "no text", "no folder"])
def test_what_cannot_run_sets_nothing_aside(tmp_path, quick, why):
  def refuse(*args):
    raise ValueError("no text")

  def no_folder(*args, **kwargs):
    raise OSError("no folder")

  path = tmp_path / "rows.jsonl"
  path.write_text('{"key": "old", "status": "ok"}\n')
  grid = _grid(cpu=dict(page_sizes=(7,))) if why == "no cell" else _grid()
  if why == "no text":
    quick.setattr(sources, "make", refuse)
  if why == "no folder":
    quick.setattr(pathlib.Path, "mkdir", no_folder)
  with pytest.raises((ValueError, OSError), match=why):
    sweep.sweep(grid, tmp_path, resume=False)
  assert list(tmp_path.iterdir()) == [path]  # no report either


def test_another_experiments_config():
  with pytest.raises(ValueError, match="no 'source'.*configs/qwen.py"):
    grid_lib.from_config(decode.get_config("tiny"))


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.page_size=8", 'Did you mean "page_sizes"'),
    ("--config.seed=x", "--config.seed=x: invalid literal for int()"),
    ("--config=configs/qwen.py:tinny", "no variant 'tinny'"),
  ],
)
def test_a_wrong_flag_is_one_line(flag, message):
  done = _command(flag)
  assert done.returncode != 0
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(page_sizes=(8, "x")), "config.page_sizes"),
    (dict(page_sizes=(0,)), "config.page_sizes"),
    (dict(phases=("decoed",)), 'did you mean "decode"'),
    (dict(cpu=dict(dtype="float31")), 'did you mean "float32"'),
    (dict(cpu=dict(implementations=("xxla",))), 'did you mean "xla"'),
    (dict(ratios=(3,)), "does not divide"),
    (dict(source="smollm3"), 'did you mean "smollm2"'),
    (dict(seed=-1), "config.seed is -1: pass at least 0"),
    (dict(cpu=dict(decode_batch=0)), "config.cpu.decode_batch is 0"),
    (dict(cpu=dict(seconds=-0.5)), "config.cpu.seconds is -0.5"),
  ],
)
def test_a_wrong_config_value_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _grid(**changes)


def test_the_full_grids_name_every_cell():
  grid = grid_lib.from_config(qwen.get_config())
  here, elsewhere = grid_lib.expand(grid, on_gpu=True)
  assert not elsewhere
  places = {
    (c.shape.phase, c.group, c.shape.group_size, c.shape.page_size)
    for c in here if c.group == grid_lib.RATIO_AXIS
  }
  assert len(places) == 2 * 5 * 6
  assert {c.implementation for c in here} == {"hopper", "triton", "xla"}
  assert not any(c.interpret for c in here)
  assert len({c.key for c in here}) == len(here)
  here, elsewhere = grid_lib.expand(grid, on_gpu=False)
  assert all(c.interpret == (c.implementation == "triton") for c in here)
  assert any(c.implementation == "triton" for c in elsewhere)
  smol = grid_lib.from_config(smollm2.get_config("tiny"))
  assert {c.group for c in grid_lib.expand(smol, False)[0]} == {"smollm2-135m"}


def test_the_report_copes_with_nothing_but_failures(tmp_path):
  paths = report.write([], tmp_path, title="empty", needs_gpu=[])
  assert "0 / 0" in paths["html"].read_text()
