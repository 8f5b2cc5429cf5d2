"""Public cases, overrides, inputs, golden and the comparison."""

import dataclasses
import math

import numpy as np
import pytest

from paged_jax.simulate import cases, inputs

CASE = cases.Case(
  id="test",
  origin="test",
  size="cpu",
  query_heads=6,
  kv_heads=2,
  head_dim=16,
  block=8,
  table_width=9,
  lengths=(17, 0, 8, 1),
  dtype="float32",
  atol=1e-3,
  rtol=1e-3,
)


def exact(x: inputs.Inputs) -> np.ndarray:
  """Token by token softmax in float64, straight from the page table."""
  batch, heads, head_dim = x.query.shape
  ratio = heads // x.k_pages.shape[1]
  out = np.zeros((batch, heads, head_dim))
  for b in range(batch):
    for n in range(heads):
      logits, values = [], []
      for t in range(x.lengths[b]):
        at = x.page_table[b, t // x.block], n // ratio, t % x.block
        key = x.k_pages[at].astype(np.float64)
        logits.append(x.query[b, n].astype(np.float64) @ key / head_dim**0.5)
        values.append(x.v_pages[at].astype(np.float64))
      if logits:
        weights = np.exp(np.array(logits) - max(logits))
        out[b, n] = weights @ np.array(values) / weights.sum()
  return out


def test_every_case_names_its_origin_and_can_be_run():
  assert len(cases.public_cases()) == 24
  assert all(entry["origin"] for entry in cases.public_cases().values())
  for name in cases.simulated_ids():
    for case in cases.runs(name):
      assert case.batch == cases.public_cases()[name]["batch"]
      if case.tasks is not None:
        assert case.tasks == case.expected_tasks


def test_runs_follow_the_notes_of_a_case():
  assert [c.lengths for c in cases.runs("mgx-decode")] == [
    (n,) for n in range(101, 106)
  ]
  assert [c.lengths for c in cases.runs("sim-gqa-b1")] == [
    (n,) for n in (128, 4096, 6144, 8192, 16384)
  ]
  (ragged,) = cases.runs("sim-varseq64")
  assert ragged.lengths[:9] == (
    8193, 4096, 1024, 256, 8000, 512, 2048, 7777, 8193
  )
  assert len(ragged.lengths) == 64


def test_override_drops_published_counts_and_widens_the_table():
  (case,) = cases.runs("sim-readme", block=16, context=(300, 7), batch=3)
  assert case.lengths == (300, 7, 300)
  assert case.tasks is None and case.out_elements is None
  assert case.table_width == 19
  assert case.expected_tasks == 4 * (19 + 1 + 19)


def test_select():
  assert cases.select("sim-case1, sim-readme,sim-case1") == (
    "sim-case1", "sim-readme"
  )
  assert set(cases.select("all")) == set(cases.select("cpu,gpu"))
  assert "mgx-prefill" not in cases.select("all")
  assert "sim-prod1" in cases.select("gpu")


@pytest.mark.parametrize(
  "text, message",
  [
    ("sim-raedme", 'did you mean "sim-readme"'),
    ("nothing-like-it", "known: all, cpu, gpu"),
    ("mgx-prefill", "prefill"),
    ("", "no case given"),
  ],
)
def test_select_refuses(text, message):
  with pytest.raises(ValueError, match=message):
    cases.select(text)


@pytest.mark.parametrize(
  "override, message",
  [
    (dict(block=0), "block must be at least 1, got 0"),
    (dict(batch=0), "batch must be at least 1, got 0"),
    (dict(query_heads=30, kv_heads=8), "query_heads=30 is not a multiple"),
    (dict(kv_heads=0), "kv_heads must be at least 1"),
    (dict(head_dim=-1), "head_dim must be at least 1"),
    (dict(context=(-1,)), "context must not be negative"),
    (dict(context=()), "context must name"),
    (dict(dtype="bfloat"), 'did you mean "bfloat16"'),
  ],
)
def test_bad_override(override, message):
  with pytest.raises(ValueError, match=message):
    cases.runs("sim-readme", **override)


def test_narrow_table_is_refused():
  with pytest.raises(ValueError, match="too narrow for 3 pages"):
    dataclasses.replace(CASE, table_width=2)


def test_inputs_scatter_pages_and_poison_every_dead_slot():
  x = inputs.make_inputs(CASE)
  pool = len(x.k_pages)
  assert x.page_table.shape == (4, 9)
  used = x.page_table[x.page_table < pool]
  assert (x.page_table[x.page_table >= pool] == pool).all()
  assert len(set(used.tolist())) == len(used) == 3 + 0 + 1 + 1
  assert used.tolist() != sorted(used.tolist())
  live = np.zeros((pool, CASE.block), bool)
  for row, length in enumerate(CASE.lengths):
    for t in range(length):
      live[x.page_table[row, t // 8], t % 8] = True
  for pages in (x.k_pages, x.v_pages):
    assert (np.isfinite(pages).all(axis=(1, 3)) == live).all()
    assert 0.9 < pages[np.isfinite(pages)].std() < 1.1


@pytest.mark.parametrize("group", [1, 2])
def test_golden_is_exact_attention_in_float32(group):
  x = inputs.make_inputs(CASE, seed=3)
  np.testing.assert_allclose(
    inputs.golden(x, group), exact(x), rtol=1e-6, atol=1e-6
  )


def test_golden_rounds_probabilities_of_each_group_to_bfloat16():
  case = dataclasses.replace(CASE, dtype="bfloat16", lengths=(30, 0, 8, 1))
  x = inputs.make_inputs(case, seed=4)
  one, two, right = inputs.golden(x), inputs.golden(x, 2), exact(x)
  assert 1e-4 < np.abs(one - right).max() < 0.02
  assert np.abs(one - two).max() > 1e-5
  assert (one[1] == 0).all()


def test_compare_counts_and_names_the_worst():
  want = np.zeros((2, 3))
  same = inputs.compare(want, want, atol=0, rtol=0)
  assert same.passed and str(same) == "PASS (6/6 elements matched)"
  got = want.copy()
  got[1, 2], got[0, 1] = 0.5, 0.25
  off = inputs.compare(got, want, atol=0.1, rtol=0)
  assert not off.passed
  assert str(off).startswith("FAIL (4/6 elements matched; worst [1, 2]: got")
  assert off.max_abs == 0.5


def test_compare_uses_both_tolerances():
  want = np.array([10.0, 10.0])
  got = np.array([10.11, 10.13])
  assert inputs.compare(got, want, atol=0.02, rtol=0.01).matched == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_compare_never_passes_what_is_not_finite(bad):
  want = np.ones(4)
  got = want.copy()
  got[2] = bad
  assert inputs.compare(got, want, atol=1, rtol=1).matched == 3
  assert inputs.compare(want, got, atol=1, rtol=1).matched == 3


def test_compare_refuses_another_shape():
  off = inputs.compare(np.zeros(4), np.zeros((2, 2)), atol=1, rtol=1)
  assert str(off).startswith("FAIL (0/4 elements matched; shape (4,)")
