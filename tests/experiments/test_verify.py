"""The verification passes what is right and finds every fault put in."""

import dataclasses
import json

from ml_collections import config_dict
import numpy as np
import pytest

from configs import decode as decode_config
from configs import verify as config_file
from experiments import verify
from experiments.common import faults, tolerance, verification


@pytest.fixture(scope="module")
def config():
  config = config_file.get_config("tiny")
  config.model.num_layers = 1
  config.implementation = "reference"  # the quickest to compile
  config.tables = ("permuted",)
  config.steps = 2
  return config


@pytest.fixture(scope="module")
def references(config):
  return verification.references(verification.make_plan(config))


@pytest.fixture
def run(config, references, tmp_path, monkeypatch, capsys):
  """Runs the command's `run`; returns exit code, output and JSONL rows."""
  monkeypatch.setattr(verification, "references", lambda plan: references)

  def run(fault=None, **changes):
    changed = config_dict.ConfigDict(config)
    changed.update(changes)
    code = verify.run(changed, tmp_path, fault)
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    return code, capsys.readouterr().out, [json.loads(x) for x in lines]

  return run


def test_right_tables_pass(run):
  code, out, rows = run(tables=("plain", "permuted", "shared"))
  assert code == 0
  assert out.splitlines()[-1] == "PASS: 3 of 3 tables"
  assert [row["tables"] for row in rows] == ["plain", "permuted", "shared"]
  for row in rows:
    assert row["passed"] and row["fault"] is None
    assert [c["mismatches"]["Medium"] for c in row["comparisons"]] == [0] * 4
  sizes = [[c["size"] for c in row["comparisons"]] for row in rows]
  # Prompts of 11, 7 and 15 tokens; two rows share six and do not compute them.
  assert [size[0] // 512 for size in sizes] == [33, 33, 33 - 2 * 6]
  # Two decode steps of three rows; K 2, H 16.
  assert all(size[1:] == [2 * 3 * 512, 39 * 32, 39 * 32] for size in sizes)


def test_combined_tables_pass(run):
  code, out, _ = run(tables=("combined", "shared+combined"))
  assert code == 0 and "PASS: 2 of 2 tables" in out


def test_an_older_result_is_kept_aside(run, monkeypatch, tmp_path):
  monkeypatch.setattr(verification, "verify", lambda plan, references: [])
  (tmp_path / "tiny.jsonl").write_text("older\n")
  _, out, rows = run()
  assert rows == [] and "earlier run's rows are kept as" in out
  assert (tmp_path / "tiny.1.jsonl").read_text() == "older\n"


@pytest.mark.parametrize("fault", faults.NAMES)
def test_every_fault_fails(run, fault):
  code, out, rows = run(fault)
  assert code == 1
  assert out.splitlines()[-1] == "FAIL: 1 of 1 tables: permuted"
  assert rows[0]["fault"] == fault and not rows[0]["passed"]
  failed = {c["name"] for c in rows[0]["comparisons"] if not c["passed"]}
  assert "decode logits" in failed
  # What no step computes from itself shows only in the cache.
  stored = {
    "slot": {"cache K", "cache V"},
    "poison": {"cache K"},
    "shift": {"cache K", "cache V"},
  }
  assert failed & {"cache K", "cache V"} == stored.get(fault, set())


def _verdict(references, **changes):
  got = dataclasses.replace(references.standard, **changes)
  computed = np.ones(len(got.prefill), bool)
  return verification.compare(got, references, computed)


def _names(comparisons):
  return [c.name for c in comparisons if not c.passed]


def test_one_wrong_element_of_the_cache_fails(references):
  assert not _names(_verdict(references))
  v = references.standard.v.copy()
  v[0, 17, 1, 3] += 1e-3 * abs(v[0, 17, 1, 3]) + 2e-4
  failed = [c for c in _verdict(references, v=v) if not c.passed]
  assert [c.name for c in failed] == ["cache V"]
  assert failed[0].mismatches == {
    "Tight": 1, "Medium": 1, "Loose": 0, "Very loose": 0
  }
  assert "[0, 17, 1, 3]" in failed[0].problem


def test_two_tokens_that_swapped_slots_fail(references):
  # Attention does not care about the order: only the cache tells.
  order = np.arange(references.standard.k.shape[1])
  order[[4, 5]] = order[[5, 4]]
  swapped = {
    name: getattr(references.standard, name)[:, order] for name in ("k", "v")
  }
  assert _names(_verdict(references, **swapped)) == ["cache K", "cache V"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_fails_even_where_both_are(references, value):
  decode = references.standard.decode.copy()
  decode[1, 2, 3] = value
  both = dataclasses.replace(
    references, standard=dataclasses.replace(references.standard, decode=decode)
  )
  assert _names(_verdict(both)) == ["decode logits"]
  assert _names(_verdict(references, decode=decode)) == ["decode logits"]


def test_another_size_fails(references):
  k = references.standard.k[:, :-1]
  (failed,) = (c for c in _verdict(references, k=k) if not c.passed)
  assert failed.problem == "shape [1, 38, 2, 16] against [1, 39, 2, 16]"
  # Shapes that NumPy would broadcast are different too.
  one = tolerance.compare("x", np.ones((3, 1)), np.ones((3, 3)))
  assert not one.passed
  assert not tolerance.compare("x", np.ones(0), np.ones(0)).passed


def test_mismatches_are_counted_by_the_formula():
  b = np.array([0.0, 1.0, -100.0, 10.0])
  a = b + np.array([9.9e-5, 1.2e-3, -0.2, 0.0])
  c = tolerance.compare("x", a, b)
  assert c.mismatches == {"Tight": 3, "Medium": 2, "Loose": 0, "Very loose": 0}
  assert c.max_abs == pytest.approx(0.2)
  assert c.max_rel == pytest.approx(2e-3)
  assert c.mean_abs == pytest.approx((9.9e-5 + 1.2e-3 + 0.2) / 4)
  assert "2 mismatches at Medium, the worst at [2]" in c.problem


def test_half_precision_is_held_against_what_rounding_costs():
  rng = np.random.default_rng(0)
  exact = rng.normal(size=1000)
  naive = exact + 1e-2 * rng.normal(size=1000)
  passed = lambda a: tolerance.compare(
    "x", a, naive, exact=exact, naive=naive
  ).passed
  assert passed(exact) and passed(naive) and passed(2 * exact - naive)
  assert not passed(exact + 1.6 * (naive - exact))  # mean
  worst = naive.copy()
  worst[0] = exact[0] + 2.2 * np.abs(naive - exact).max()
  assert not passed(worst)
  worst[0] = np.nan
  assert not passed(worst)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(config, tmp_path, capsys, dtype):
  half = config_dict.ConfigDict(config)
  half.model.dtype = dtype
  assert verify.run(half, tmp_path) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(tables=("permuted+share",)), "did you mean 'shared'|\"shared\""),
    (dict(lengths=(7, 6)), "every prompt needs more than"),
    (dict(page_size=0), "config.page_size is 0"),
    (dict(steps=0), "config.steps is 0"),
    (dict(seed=-1), "config.seed is -1"),
    (dict(tables=()), "need an entry each"),
  ],
)
def test_bad_config(config, changes, message):
  bad = config_dict.ConfigDict(config)
  bad.update(changes)
  with pytest.raises(ValueError, match=message):
    verification.make_plan(bad)


def test_another_experiments_config(tmp_path):
  with pytest.raises(ValueError, match="no 'tables'.*configs/verify.py"):
    verify.run(decode_config.get_config("tiny"), tmp_path)
