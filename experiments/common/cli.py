"""A main whose user errors are sentences, not tracebacks."""

from collections.abc import Callable, Sequence
import re
import sys

from absl import app, flags


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Runs an absl main; a bad flag or config ends with one line and code 2.

  Args:
    main: takes argv, returns an exit code; a ValueError it raises is the
      user's, and printed as such.
  """

  def guarded(argv):
    try:
      return main(argv)
    except ValueError as error:
      _fail(error)

  app.run(guarded, flags_parser=_parse)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections: `'page_size'\nDid you mean "page_sizes" ...?`
    message = str(error).strip("\"").replace("\\'", "'").replace("\\n", "\n")
    name, _, hint = message.partition("\n")
    _fail(f"the config has no field {name.strip()}. {_short(hint)}")
  except (flags.Error, ValueError, TypeError, OSError) as error:
    # An error inside a config file arrives with its traceback: keep the ends.
    first, *rest = str(error).strip().splitlines()
    _fail(f"{first} {rest[-1]}" if rest else first)


def _short(hint):
  found = re.search(r'Did you mean "([^"]+)"', hint)
  return f'Did you mean "{found[1]}"?' if found else hint


def _fail(error):
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)
