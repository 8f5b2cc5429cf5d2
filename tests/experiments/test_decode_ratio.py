"""The decode ratio: what it loads and what it logs."""

import json
import types

import pytest

from experiments import decode_ratio
from experiments.common import loading


@pytest.fixture
def flags(monkeypatch):
  """Sets flags, by name: other modules' may have taken their places."""
  values = dict(
    model="smollm2-135m", weights="random", context=3, batch=1, page_size=4,
    steps=2, warmup=1, dtype="float32", implementation=None,
  )

  def set_flags(**changes):
    for name, value in (values | changes).items():
      holder = types.SimpleNamespace(value=value)
      monkeypatch.setattr(decode_ratio, f"_{name.upper()}", holder)

  return set_flags


def test_a_model_that_the_weights_are_not_of_is_refused(flags):
  flags(weights="smollm2", model="qwen2.5-0.5b")
  with pytest.raises(ValueError, match="--model=qwen2.5-0.5b has no weights"):
    decode_ratio.load()
  flags(model="tiny")
  assert decode_ratio.load().title == "tiny (random weights)"


def test_what_was_loaded_is_logged(flags, monkeypatch, capsys):
  flags(weights="smollm2")
  model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=5))
  seen = []

  def load(spec):
    seen.append(spec)
    return loading.Loaded(model=model, path=None, title="SmolLM2-x")

  monkeypatch.setattr(loading, "load", load)
  for path in ("_paged", "_contiguous"):
    monkeypatch.setattr(decode_ratio, path, lambda *_: lambda tokens: tokens)
  decode_ratio.main()
  assert seen[0]["weights"] == "smollm2"
  line, row = capsys.readouterr().out.splitlines()
  assert line.startswith("decode SmolLM2-x, batch 1, context 3, page 4: ")
  row = json.loads(row)
  assert (row["model"], row["weights"]) == ("SmolLM2-x", "smollm2")
