"""The tuner of the Hopper decode kernel: what it tries, what it keeps."""

import dataclasses
import importlib.resources
import json

import jax
import pytest

from experiments.common import cells, shapes, tuning
from paged_jax.ops import hopper_tuning


def test_candidates_are_many_and_all_fit():
  shape = shapes.named()["qwen2.5-0.5b_dec_b64_c4096_p16_const"]
  tried = tuning.candidates(shape)
  assert tried[0] == {} and dict(tile=256, kb=2) in tried
  configs = [
    hopper_tuning.choose(
      tuning.geometry(shape), shape.batch, 256, overrides=overrides
    )
    for overrides in tried
  ]
  assert len(set(configs)) > 10
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


def test_a_geometry_keeps_its_row_until_all_its_shapes_are_timed():
  known = [
    dataclasses.replace(
      shapes.named()["llama3-8b_dec_b64_c8192_p16_const"], name=name
    )
    for name in "ab"
  ]
  key = hopper_tuning.table_key(tuning.geometry(known[0]), 64)
  old = [key | dict(set=dict(kb=1), ratio=0.9, shapes=["a", "b"])]
  rows = _rows(key, [({}, (1, 1)), (dict(tile=64), (0.5, 0.5))])
  some = [row for row in rows if row["name"] == "a"]
  assert tuning.table(some, old, known) == old
  (new,) = tuning.table(rows, old, known)
  assert new == key | dict(set=dict(tile=64), ratio=0.5, shapes=["a", "b"])


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


def _tiny(name, head_dim):
  """A shape, and the least effort to time it with."""
  shape = shapes.Shape(
    name=name, phase="decode", batch=2, num_heads=2, num_kv_heads=1,
    head_dim=head_dim, page_size=16, context=40, dtype="bfloat16",
  )
  return shape, cells.Effort(
    steps=1, cold_bytes=0, seconds=0.0, repeats=2, ahead=1, most_layers=1
  )


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)
def test_a_shape_is_tuned():
  shape, effort = _tiny("tiny", head_dim=64)
  said = []
  (rows,) = tuning.run([shape], effort, seed=0, say=said.append)
  assert said == ["compiled tiny"]
  assert len(rows) == len(tuning.candidates(shape)) > 1
  assert {row["status"] for row in rows} == {"ok"}
  assert rows[0]["ratio"] == 1
  assert list(tuning.run([shape], effort, 0, seconds=0, say=said.append)) == []
  assert "out of time" in said[-1]


def test_a_process_that_dies_costs_its_shape_only():
  shape, effort = _tiny("no such head", head_dim=48)
  said = []
  assert list(tuning.run([shape], effort, 0, say=said.append)) == []
  assert said[0] == "failed: no such head, see above"
