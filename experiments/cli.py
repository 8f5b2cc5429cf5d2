"""Starts an experiment: wrong input ends in one line, not in a traceback."""

from collections.abc import Callable, Sequence
import sys

from absl import app, flags


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """`absl.app.run`, but a flag that cannot be set is reported in one line.

  ml_collections raises an AttributeError for an unknown `--config.x` (it names
  the nearest known one) and TypeError or ValueError for a value of the wrong
  type, out of the flag parser.

  Args:
    main: takes argv, returns the exit code.
  """
  app.run(main, flags_parser=_parse)


def fail(error: BaseException) -> None:
  """Ends the program with exit code 1 and the error as one line on stderr."""
  text = " ".join(str(error).split())
  sys.exit(f"error: {text}")


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(list(argv))
  except flags.Error as error:
    fail(error)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # ml_collections quotes the message of a missing field once too often.
    text = str(error).strip("'\"").replace("\\n", " ").replace("\\'", "'")
    fail(ValueError(f"cannot set a flag: {text}"))
