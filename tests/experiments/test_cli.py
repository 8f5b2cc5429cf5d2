"""The start of an experiment: wrong input is one line."""

import pytest

from experiments import cli


@pytest.fixture
def start(monkeypatch):
  """Returns (main, *arguments) -> exit code, without absl's parsing."""

  def start(main, *arguments):
    codes = []
    monkeypatch.setattr(
      cli.app, "run",
      lambda guarded, flags_parser: codes.append(guarded(["x", *arguments])),
    )
    cli.run(main)
    return codes[0]

  return start


def test_the_exit_code_is_the_mains(start):
  assert start(lambda: 3) == 3


def test_an_argument_that_is_no_flag_is_refused(start):
  with pytest.raises(SystemExit, match="error: unknown argument 'tiny'"):
    start(lambda: pytest.fail("it ran"), "tiny")


def test_an_interrupted_run_promises_nothing(start, capsys):
  def main():
    raise KeyboardInterrupt

  assert start(main) == 130
  assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("argv", [
  ["--config=configs/nope.py:tiny", "--config.seed=3"],
  ["--verbose", "--config", "configs/nope.py:tiny"],
])
def test_a_config_that_is_not_there(argv):
  with pytest.raises(SystemExit) as error:
    cli._parse(["x", *argv], config="configs/qwen.py")
  assert error.value.code == (
    "error: --config=configs/nope.py:tiny: there is no such file"
  )


def test_a_config_needs_what_the_experiment_reads():
  cli.need(dict(a=1, b=2), "a", "b", like="configs/qwen.py")
  with pytest.raises(ValueError, match="no 'b'.* --config=configs/qwen.py"):
    cli.need(dict(a=1), "a", "b", like="configs/qwen.py")
