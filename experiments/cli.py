"""Starts an experiment: wrong input ends in one line, not in a traceback."""

from collections.abc import Callable, Container, Sequence
import functools
import pathlib
import sys

from absl import app, flags

# What a user's mistake raises: a wrong value, weights or a library that are
# not there, a pool too small, an implementation that cannot do the call.
USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)


def run(
  main: Callable[[], int | None], *, config: str | None = None
) -> None:
  """`absl.app.run` with a default config, and one line for a wrong value.

  The main declares `DEFINE_config_file("config")` without a default: with one,
  ml_collections applies `--config.x=` flags as the module is imported, where a
  typo (it names the nearest known field) cannot be caught.

  Args:
    main: returns the exit code; USER_ERRORS of its own are taken for the
      user's.
    config: file used without `--config`, relative to the project's root; None
      for a main that has no config.
  """

  def guarded(argv):
    try:
      if argv[1:]:
        raise ValueError(f"unknown argument {argv[1]!r}: flags start with --")
      return main()
    except USER_ERRORS as error:
      fail(error)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return 130

  if config is not None:
    config = str(pathlib.Path(__file__).parents[1] / config)
  app.run(guarded, flags_parser=functools.partial(_parse, config=config))


def fail(error: BaseException) -> None:
  """Ends the program with exit code 1 and the error as one line on stderr."""
  sys.exit(f"error: {' '.join(str(error).split())}")


def need(config: Container[str], *names: str, like: str) -> None:
  """Checks that a config is one of this experiment, not of another.

  Args:
    config: of any experiment.
    names: fields or sections that tell this experiment's.
    like: the file of a config that has them.

  Raises:
    ValueError: one is missing.
  """
  for name in names:
    if name not in config:
      raise ValueError(
        f"the config has no {name!r}, so it is for another experiment: pass "
        f"--config={like} or one like it"
      )


def _parse(argv: Sequence[str], *, config: str | None) -> list[str]:
  argv = list(argv)
  if config is not None:
    given = _configs(argv)
    for path in given:
      # Found missing by ml_collections, it is an error of whoever reads it.
      if not pathlib.Path(path.split(":")[0]).is_file():
        fail(FileNotFoundError(f"--config={path}: there is no such file"))
    if not given:
      argv.insert(1, f"--config={config}")
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # What a config file raises arrives as a traceback: its last line says it.
    first, *rest = str(error).strip().splitlines()
    fail(ValueError(" ".join([first, *rest[-1:]])))
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # A missing field arrives as the text of a KeyError, quotes and all.
    text = str(error).strip("'\"").replace("\\n", " ").replace("\\'", "'")
    fail(ValueError(f"cannot set a flag: {text}"))


def _configs(argv):
  """Returns the values of `--config=FILE` and `--config FILE`."""
  values = []
  for arg, following in zip(argv[1:], [*argv[2:], ""]):
    name, equals, value = arg.partition("=")
    if name in ("-config", "--config"):
      values.append(value if equals else following)
  return values
