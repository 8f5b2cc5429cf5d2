"""The prefill experiment: paths that agree, figures that add up, errors."""

import dataclasses
import json

import numpy as np
import pytest

from configs import qwen
from experiments import prefill
from experiments.common import prefilling


@pytest.fixture(scope="module")
def config():
  config = qwen.get_config("tiny")
  config.length = 21
  config.prefill.chunks = (8,)
  config.prefill.page_size = 4
  config.prefill.implementation = "reference"  # the quickest to compile
  config.prefill.cpu.num_layers = 1
  return config


def test_run_prints_and_writes(config, tmp_path, capsys):
  assert prefill.run(config, tmp_path) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "batch 2, 21 tokens each" in lines[0]
  names = ["standard", "paged", "chunk 8"]
  assert [" ".join(line[:12].split()) for line in lines[2:5]] == names
  assert [line.endswith("logits ok") for line in lines[2:5]] == [0, 1, 1]
  rows = [json.loads(x) for x in (tmp_path / "qwen_tiny.jsonl").open()]
  assert [row["path"] for row in rows] == names
  for row in rows:
    ms = row["ms"]
    assert len(ms) == config.prefill.cpu.repeats
    assert row["min_ms"] == min(ms) and row["max_ms"] == max(ms)
    assert row["median_ms"] == np.median(ms)
    assert row["avg_ms"] == pytest.approx(np.mean(ms))
    # The whole batch: two prompts of 21.
    assert row["tokens_per_s"] == pytest.approx(42e3 / row["median_ms"])
  ratios = np.array(rows[1]["ms"]) / np.array(rows[0]["ms"])
  assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == np.median(ratios)


def test_wrong_logits_fail(config, tmp_path, capsys, monkeypatch):
  # No model runs: the second path's logits are off in one element.
  def call(plan, *chunk):
    logits = np.ones((2, 5), np.float32)
    logits[1, 3] += 2e-3 * bool(chunk)
    return lambda: logits

  monkeypatch.setattr(prefilling, "standard_call", call)
  monkeypatch.setattr(prefilling, "paged_call", call)
  assert prefill.run(config, tmp_path) == 1
  out = capsys.readouterr().out
  assert "1 mismatches at Medium, the worst at [1, 3]" in out
  assert out.splitlines()[-1] == "FAIL: wrong logits: paged, chunk 8"


def test_paths_take_turns():
  seen = []
  calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
  ms = prefilling.measure(calls, warmup=2, repeats=3)
  assert "".join(seen) == "abc" * 5
  assert all(len(times) == 3 for times in ms.values())


def test_chunks_cover_every_token_once():
  tokens = np.arange(1, 15, dtype=np.int32).reshape(2, 7)
  steps = prefilling._packed(tokens, 3)
  assert [packed.shape for packed, _ in steps] == [(6,)] * 3
  rows = [[], []]
  for packed, counts in steps:
    at = 0
    for row, n in zip(rows, counts):
      row += packed[at : at + n].tolist()
      at += int(n)
    assert not packed[at:].any()
  assert rows == tokens.tolist()


def test_a_chunk_of_the_whole_prompt_is_left_out(config):
  plan = prefilling.make_plan(config)
  assert plan.chunks == (8,)
  config = config.copy_and_resolve_references()
  config.prefill.chunks = (8, 21, 8, 64)
  assert prefilling.make_plan(config).chunks == (8,)


def test_pages_are_scattered(config):
  plan = prefilling.make_plan(config)
  table, cache = prefilling._pages(plan)
  assert table.pages.shape == (2, 6) and cache.num_pages == 12
  assert not (np.asarray(table.pages).ravel() == np.arange(12)).all()
  two = dataclasses.replace(plan, page_size=16)
  assert prefilling._pages(two)[0].pages.shape == (2, 2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(length=0), "config.length is 0"),
    (dict(prefill=dict(chunks=(0,))), "config.prefill.chunks is 0"),
    (dict(prefill=dict(page_size=-1)), "config.prefill.page_size is -1"),
    (dict(prefill=dict(model="qwen2.5-05b")), "did you mean"),
    (dict(prefill=dict(weights="/nowhere.gguf")), "there is no such file"),
    (dict(prefill=dict(cpu=dict(dtype="float8"))), "config.model.dtype"),
  ],
)
def test_bad_config(config, change, message):
  bad = config.copy_and_resolve_references()
  bad.update(change)
  with pytest.raises((ValueError, OSError), match=message):
    prefilling.make_plan(bad)


def test_a_config_without_the_section(config, tmp_path):
  bad = config.copy_and_resolve_references()
  del bad.prefill
  with pytest.raises(ValueError, match="no section prefill"):
    prefill.run(bad, tmp_path)
