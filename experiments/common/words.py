"""The nearest known word, for people who mistype."""

from collections.abc import Iterable
import difflib


def did_you_mean(word: object, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest known word, or nothing."""
  near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
  return f"; did you mean {near[0]!r}?" if near else ""
