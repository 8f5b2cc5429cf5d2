"""The tuner of the Hopper decode kernel: what it tries, what it keeps."""

import importlib.resources
import json

import jax
import pytest

from experiments.common import cells, shapes, tuning
from paged_jax.ops import hopper_tuning


def test_candidates_differ_from_the_rule_and_from_each_other():
  shape = shapes.named()["qwen2.5-0.5b_dec_b64_c4096_p16_const"]
  tried = tuning.candidates(shape)
  assert tried[0] == {} and dict(tile=256, kb=2) in tried
  configs = [
    hopper_tuning.choose(
      tuning.geometry(shape), shape.batch, 256, overrides=overrides
    )
    for overrides in tried
  ]
  assert len(set(configs)) == len(configs)
  assert all(config.stages >= 2 for config in configs)


def _rows(key, times):
  return [
    dict(name=name, row=key, set=overrides, ratio=ratio)
    for overrides, ratios in times
    for name, ratio in zip("ab", ratios, strict=True)
  ]


def test_a_winner_gains_on_the_whole_and_loses_nowhere():
  fast, mixed, slow = dict(tile=64), dict(tile=128), dict(tile=256)
  times = [({}, (1, 1)), (fast, (0.97, 1.0)), (mixed, (0.8, 1.05)),
           (slow, (1.1, 1.1))]
  table = tuning.winners(
    _rows(dict(H=64), times)
    + _rows(dict(H=96), [({}, (1, 1)), (fast, (0.995, 1.0))])
  )
  assert [(row["H"], row["set"]) for row in table] == [(64, fast)]
  assert table[0]["ratio"] == pytest.approx(0.985, abs=1e-3)


def test_a_candidate_that_failed_on_a_shape_does_not_win():
  rows = _rows(dict(H=64), [({}, (1, 1)), (dict(tile=64), (0.5, 0.5))])
  rows[-1].pop("ratio")
  assert tuning.winners(rows) == []


def test_every_row_of_the_table_is_a_valid_choice():
  path = importlib.resources.files("paged_jax") / "data" / "hopper_decode.json"
  known = shapes.named()
  for row in json.loads(path.read_text())["rows"]:
    for name in row["shapes"]:
      geometry = tuning.geometry(known[name])
      key = hopper_tuning.table_key(geometry, known[name].batch)
      assert key.items() <= row.items()
      hopper_tuning.choose(
        geometry, known[name].batch, 512, overrides=row["set"]
      )


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)
def test_a_shape_is_tuned():
  shape = shapes.Shape(
    name="tiny", phase="decode", batch=2, num_heads=2, num_kv_heads=1,
    head_dim=64, page_size=16, context=40, dtype="bfloat16",
  )
  effort = cells.Effort(
    steps=1, cold_bytes=0, seconds=0.0, repeats=2, ahead=1, most_layers=1
  )
  rows = list(tuning.run([shape], effort, seed=0))
  assert len(rows) == len(tuning.candidates(shape)) > 1
  assert {row["status"] for row in rows} == {"ok"}
  assert rows[0]["ratio"] == 1
