"""The prefill experiment: paths that agree, figures that add up, errors."""

import json
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen
from experiments import prefill
from experiments.common import ceilings, model_work, prefilling, timing
from paged_jax.models import config as model_config
from paged_jax.models import contiguous
from paged_jax.models.transformer import Transformer


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
  (tmp_path / "qwen_tiny.jsonl").write_text("older\n")
  assert prefill.run(config, tmp_path) == 1
  assert (tmp_path / "qwen_tiny.1.jsonl").read_text() == "older\n"
  out = capsys.readouterr().out
  assert "1 mismatches at Medium, the worst at [1, 3]" in out
  assert out.splitlines()[-1] == "FAIL: wrong logits: paged, chunk 8"


def test_a_folder_that_cannot_be_made_is_told_before_the_run(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(prefilling, "run", lambda plan: pytest.fail("it ran"))
  (tmp_path / "file").touch()
  with pytest.raises(OSError):
    prefill.run(config, tmp_path / "file" / "out")


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


def test_pages_are_scattered():
  sizes = model_config.named("tiny")
  table, cache = prefilling.scattered(sizes, batch=2, tokens=21, page_size=4)
  assert table.pages.shape == (2, 6) and cache.num_pages == 12
  assert not (np.asarray(table.pages).ravel() == np.arange(12)).all()
  assert sorted(np.asarray(table.pages).ravel()) == list(range(12))
  assert not table.lengths.any()
  two, _ = prefilling.scattered(sizes, batch=2, tokens=21, page_size=16)
  assert two.pages.shape == (2, 2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(length=0), "config.length is 0"),
    (dict(prefill=dict(chunks=(0,))), "config.prefill.chunks is 0"),
    (dict(prefill=dict(page_size=-1)), "config.prefill.page_size is -1"),
    (dict(prefill=dict(model="qwen2.5-05b")), "did you mean"),
    (dict(prefill=dict(weights="/nowhere.gguf")), "there is no such file"),
    (dict(prefill=dict(cpu=dict(dtype="float8"))), "config.model.dtype"),
    (dict(prefill=dict(cpu=dict(standard="cuda"))),
     "config.prefill.cpu.standard is 'cuda'"),
    (dict(prefill=dict(cpu=dict(standard="cudnn"))),
     "config.prefill.cpu.standard is 'cudnn'.* half precision only"),
    (dict(prefill=dict(cpu=dict(warmup=0))), "config.prefill.cpu.warmup is 0"),
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
  with pytest.raises(ValueError, match="no 'prefill'.*configs/qwen.py"):
    prefill.run(bad, tmp_path)


def test_the_standard_path_attends_as_configured(config, monkeypatch):
  seen, dense = [], jax.nn.dot_product_attention

  def spy(*args, implementation, **kwargs):
    seen.append(implementation)
    return dense(*args, **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
  config = config.copy_and_resolve_references()
  config.prefill.cpu.dtype, config.prefill.cpu.standard = "bfloat16", "cudnn"
  plan = prefilling.make_plan(config)
  prefilling.standard_call(plan)()
  assert seen == ["cudnn"]
  prefilling._exact(plan)  # float32, which cuDNN does not know
  assert seen == ["cudnn", "xla"]


def test_a_gpu_is_told_of_its_efficiency(config, tmp_path, capsys, monkeypatch):
  # What CUPTI would see: launches and us.
  kernels = {
    "nvjet_sm90_tst_256x128": (4, 3e3),
    "paged_prefill_mosaic_gpu_kernel": (1, 500.0),
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": (1, 250.0),
    "write_kv": (1, 20.0),
    "loop_dynamic_update_slice_fusion": (1, 30.0),
    "loop_multiply_fusion": (9, 700.0),
  }
  top = types.SimpleNamespace(matmul_tflops=2.0)
  monkeypatch.setattr(timing, "kernels", lambda call, repeats: (None, kernels))
  monkeypatch.setattr(ceilings, "measure", lambda dtype: top)
  assert prefill.run(config, tmp_path) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "matmul ceiling 2 TFLOP/s" in lines[5]
  assert [line[:8].strip() for line in lines[7:10]] == [
    "standard", "paged", "chunk 8"
  ]
  for row in [json.loads(x) for x in (tmp_path / "qwen_tiny.jsonl").open()]:
    assert row["kernels_ms"] == pytest.approx(4.5)
    assert row["attention_ms"] == pytest.approx(0.75)
    assert row["writes_ms"] == pytest.approx(0.05)
    assert row["matmuls_ms"] == 3 and row["rest_ms"] == pytest.approx(0.7)
    assert row["attention_share"] == pytest.approx(0.75 / row["median_ms"])
    flops = row["dense_flops"] + row["attention_flops"]
    assert row["tflops"] == pytest.approx(flops / 1e9 / row["median_ms"])
    assert row["mfu"] == pytest.approx(row["tflops"] / 2)
    assert row["kernels"][0] == ["nvjet_sm90_tst_256x128", 4, 3e3]


def test_flops_are_those_of_the_products():
  # Every product of the standard path, whose attention is the full square.
  config = model_config.named("tiny", dtype="float32")
  B, S = 2, 11
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  graph, weights = nnx.split(model)
  cache = contiguous.create_cache(config, num_sequences=B, max_length=S)

  def call(weights, cache):
    tokens, lengths = jnp.zeros((B, S), jnp.int32), jnp.full(B, S)
    return contiguous.prefill(nnx.merge(graph, weights), cache, tokens, lengths)

  square = 4 * B * S * S * config.num_heads * config.head_dim * 2  # layers
  work = model_work.of_prefill(config, B, S)
  found = _product_flops(jax.make_jaxpr(call)(weights, cache).jaxpr)
  assert found == work.dense + square
  assert work.attention == square * (S + 1) // (2 * S)


def _product_flops(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      depth = np.prod([shape[axis] for axis in contracted])
      total += 2 * depth * eqn.outvars[0].aval.size
    for value in eqn.params.values():
      if hasattr(value, "jaxpr"):
        total += _product_flops(value.jaxpr)
  return total
