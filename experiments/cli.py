"""Starts an experiment: wrong input ends in one line, not in a traceback."""

from collections.abc import Callable, Sequence
import functools
import pathlib
import sys

from absl import app, flags


def run(main: Callable[[Sequence[str]], int | None], *, config: str) -> None:
  """`absl.app.run` with a default config, and one line for a wrong flag.

  The main declares `DEFINE_config_file("config")` without a default: with one,
  ml_collections applies `--config.x=` flags as the module is imported, where a
  typo (it names the nearest known field) cannot be caught.

  Args:
    main: takes argv, returns the exit code.
    config: file used without `--config`, relative to the project's root.
  """
  path = pathlib.Path(__file__).parents[1] / config
  app.run(main, flags_parser=functools.partial(_parse, config=str(path)))


def fail(error: BaseException) -> None:
  """Ends the program with exit code 1 and the error as one line on stderr."""
  sys.exit(f"error: {' '.join(str(error).split())}")


def _parse(argv: Sequence[str], *, config: str) -> list[str]:
  argv = list(argv)
  if not any(arg.lstrip("-").split("=")[0] == "config" for arg in argv[1:]):
    argv.insert(1, f"--config={config}")
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    fail(error)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # A missing field arrives as the text of a KeyError, quotes and all.
    text = str(error).strip("'\"").replace("\\n", " ").replace("\\'", "'")
    fail(ValueError(f"cannot set a flag: {text}"))
