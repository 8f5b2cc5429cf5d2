"""The command: its printed lines, its files, and one line for wrong input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import decode as decode_config
from configs import simulate as config_file
from experiments import simulate
from paged_jax.simulate import cases

ROOT = pathlib.Path(__file__).parents[2]


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "experiments.simulate", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    timeout=300,
    check=False,
  )


def test_run_prints_and_writes(tmp_path):
  done = command(
    "--config=configs/simulate.py:sim-readme",
    f"--workdir={tmp_path}",
    "--config.study.batches=(1,)",
    "--config.study.contexts=(512,1024)",
    "--config.study.scales=(1,)",
  )
  assert done.returncode == 0, done.stderr
  lines = [line.strip() for line in done.stdout.splitlines()]
  assert lines.count("out: PASS (4096/4096 elements matched)") == 3
  assert any(
    line.startswith("serial: 32 tasks (expected 32), 30 edges (expected 30)")
    for line in lines
  )
  assert lines[-1] == "PASS: 3 of 3 runs"
  written = [line[6:] for line in lines if line.startswith("wrote ")]
  assert all(pathlib.Path(path).stat().st_size for path in written)
  assert sorted(pathlib.Path(path).name for path in written) == [
    "results.jsonl",
    "sim-readme.model.trace.json",
    "sim-readme.threads.trace.json",
    "sim-readme.timeline.png",
    "study.png",
  ]
  records = [
    json.loads(line)
    for line in (tmp_path / "results.jsonl").read_text().splitlines()
  ]
  runs = [record for record in records if "case" in record]
  assert [r["variant"] for r in runs] == ["serial", "unroll4", "split4"]
  assert all(r["passed"] and abs(r["replay_deviation"]) < 0.15 for r in runs)
  assert len(records) == 3 + 2 * 4
  for view in ("threads", "model"):
    trace = json.loads((tmp_path / f"sim-readme.{view}.trace.json").read_text())
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == 32


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config.case=sim-raedme"], 'did you mean "sim-readme"?'),
    (["--config.blok=3"], 'Did you mean "block"'),
  ],
)
def test_wrong_input_is_one_line(args, message):
  done = command(*args)
  assert done.returncode == 1
  assert not done.stdout
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and message in line


def test_failure_is_an_exit_code(tmp_path, monkeypatch, capsys):
  # No trace of JAX needed here: a count that cannot hold fails the run.
  entry = cases.public_cases()["sim-small1"] | {"tasks": 5}
  monkeypatch.setitem(cases.public_cases(), "sim-small1", entry)
  config = config_file.get_config("sim-small1")
  config.execute = "none"
  config.study.contexts = (512,)
  config.study.scales = config.study.batches = (1,)
  plan = simulate.make_plan(config)
  (tmp_path / "results.jsonl").write_text("older\n")
  assert simulate.run(plan, tmp_path) == 1
  assert (tmp_path / "results.1.jsonl").read_text() == "older\n"
  assert "FAIL: 1 of 3 runs: sim-small1 serial" in capsys.readouterr().out


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(block=0), "block must be at least 1, got 0"),
    (dict(query_heads=30, kv_heads=8), "query_heads=30 is not a multiple"),
    (dict(context="12,x"), "context must be whole numbers"),
    (dict(variants="serial,unrol4"), "unknown variant"),
    (dict(policy="critcal"), 'did you mean "critical"'),
    (dict(seed=-1), "config.seed is -1"),
    (dict(chip=dict(no_such=1)), "config.chip or config.threads: .*no_such"),
    (dict(execute="gpu"), "execute must be one of cpu, all, none"),
    (dict(stages="palas"), 'did you mean "pallas"'),
  ],
)
def test_bad_config(change, message):
  config = config_file.get_config()
  config.update(change)
  with pytest.raises(ValueError, match=message):
    simulate.make_plan(config)


def test_another_experiments_config():
  with pytest.raises(ValueError, match="no 'study'.*configs/simulate.py"):
    simulate.make_plan(decode_config.get_config("tiny"))


def test_config_carries_every_decode_case():
  assert set(config_file.get_config().cases) == set(cases.select("all"))
  for which in ("default", "tiny", "sim-prod1"):
    assert simulate.make_plan(config_file.get_config(which)).runs
