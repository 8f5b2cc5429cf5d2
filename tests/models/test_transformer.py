"""The decoder over pages and over an ordinary cache, against NumPy float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.cache import page_table, permute, pool
from paged_jax.models import contiguous, huggingface
from paged_jax.models import step as step_lib
from tests.models import checkpoints

_BOUND = dict(rtol=2e-5, atol=2e-5)  # float32 through two layers, |x| ~ 5
_PROMPTS = (7, 1, 12)  # tokens; page size 4: on and off the page boundary


def _sequences(config, extra, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, config.vocab_size, n + extra) for n in _PROMPTS]


def _expected(config, tensors, sequences):
  return [checkpoints.logits(config, tensors, s) for s in sequences]


def _table(combined, seed=0):
  """A table that has reserved 14 tokens a row, on scattered pages."""
  table = page_table.create_page_table(
    num_pages=31, page_size=4, num_sequences=3, max_pages=6, combined=combined
  )
  table, ok = page_table.reserve(table, jnp.full(3, 14, jnp.int32))
  assert ok.all()
  order = np.random.default_rng(seed).permutation(table.num_pages)
  return permute.permute_table(table, jnp.asarray(order))


@pytest.mark.parametrize(
  "name, combined",
  [*((name, False) for name in checkpoints.VARIANTS), ("qwen2", True)],
)
def test_paged_prefill_and_decode(name, combined):
  config = checkpoints.variant(name)
  tensors = checkpoints.random_tensors(config)
  model = huggingface.from_tensors(config, tensors)
  sequences = _sequences(config, extra=2)
  expected = _expected(config, tensors, sequences)
  table = _table(combined)
  cache = pool.create_cache(
    num_layers=config.num_layers,
    num_pages=table.num_pages,
    num_kv_heads=config.num_kv_heads,
    page_size=table.page_size,
    head_dim=config.head_dim,
    combined=combined,
  )
  # Dead slots hold poison: nothing may read them.
  cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
  counts = jnp.array(_PROMPTS, jnp.int32)
  tokens = np.concatenate([s[:n] for s, n in zip(sequences, _PROMPTS)])
  padded = np.zeros(24, np.int32)
  padded[: len(tokens)] = tokens

  @jax.jit
  def prefill(tokens, cache, table):
    table, step, ok = step_lib.prefill_step(
      table, counts, config.attention, total=24, implementation="reference"
    )
    logits, cache = model(tokens, cache, step)
    return logits, cache, table, ok

  @jax.jit
  def decode(tokens, cache, table, active):
    table, step, ok = step_lib.decode_step(
      table, active, config.attention, implementation="reference"
    )
    logits, cache = model(tokens, cache, step)
    return logits, cache, table, ok

  logits, cache, table, ok = prefill(jnp.asarray(padded), cache, table)
  assert ok.all()
  whole = np.concatenate([e[:n] for e, n in zip(expected, _PROMPTS)])
  np.testing.assert_allclose(logits[: len(tokens)], whole, **_BOUND)
  # Row 1 sits out of the first decode step and takes part in the second.
  for active in ([True, False, True], [True, True, True]):
    at = np.asarray(table.lengths)
    fed = [s[n] for s, n in zip(sequences, at)]
    logits, cache, table, ok = decode(
      jnp.asarray(fed, jnp.int32), cache, table, jnp.asarray(active)
    )
    np.testing.assert_array_equal(ok, active)
    for b in np.flatnonzero(active):
      np.testing.assert_allclose(logits[b], expected[b][at[b]], **_BOUND)
  np.testing.assert_array_equal(table.lengths, np.array(_PROMPTS) + [2, 1, 2])


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
def test_contiguous_prefill_and_decode(name):
  config = checkpoints.variant(name)
  tensors = checkpoints.random_tensors(config)
  model = huggingface.from_tensors(config, tensors)
  sequences = _sequences(config, extra=2)
  expected = _expected(config, tensors, sequences)
  tokens = np.zeros((3, max(_PROMPTS)), np.int32)
  for row, s, n in zip(tokens, sequences, _PROMPTS):
    row[:n] = s[:n]
  cache = contiguous.create_cache(config, num_sequences=3, max_length=16)
  logits, cache = jax.jit(contiguous.prefill)(
    model, cache, tokens, jnp.array(_PROMPTS, jnp.int32)
  )
  for b, n in enumerate(_PROMPTS):
    np.testing.assert_allclose(logits[b], expected[b][n - 1], **_BOUND)
  decode = jax.jit(contiguous.decode)
  for i in range(2):
    fed = [s[n + i] for s, n in zip(sequences, _PROMPTS)]
    logits, cache = decode(model, cache, jnp.asarray(fed, jnp.int32))
    for b, n in enumerate(_PROMPTS):
      np.testing.assert_allclose(logits[b], expected[b][n + i], **_BOUND)


def test_forward_of_whole_sequences():
  config = checkpoints.variant("qwen3")
  tensors = checkpoints.random_tensors(config)
  model = huggingface.from_tensors(config, tensors)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
  logits = jax.jit(contiguous.forward)(model, tokens)
  for row, got in zip(tokens, logits):
    want = checkpoints.logits(config, tensors, row)
    np.testing.assert_allclose(got, want, **_BOUND)


def _config_json(config, kind):
  scaling = config.rope.scaling
  return dict(
    model_type=kind,
    vocab_size=config.vocab_size,
    hidden_size=config.features,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.hidden,
    tie_word_embeddings=config.tied,
    rms_norm_eps=config.norm_epsilon,
    rope_theta=config.rope.theta,
    rope_scaling=scaling
    and dict(
      rope_type="llama3",
      factor=scaling.factor,
      low_freq_factor=scaling.low_freq_factor,
      high_freq_factor=scaling.high_freq_factor,
      original_max_position_embeddings=scaling.original_length,
    ),
  )


@pytest.mark.parametrize(
  "name, kind", [("llama3", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_checkpoint_folder(tmp_path, name, kind):
  safetensors_numpy = pytest.importorskip("safetensors.numpy")
  config = checkpoints.variant(name)
  tensors = checkpoints.random_tensors(config)
  names = sorted(tensors)
  # Two shards; a tied model's file may repeat the embedding.
  first = {n: tensors[n] for n in names[::2]}
  second = {n: tensors[n] for n in names[1::2]}
  if config.tied:
    second["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  safetensors_numpy.save_file(first, tmp_path / "model-1.safetensors")
  safetensors_numpy.save_file(second, tmp_path / "model-2.safetensors")
  text = json.dumps(_config_json(config, kind))
  (tmp_path / "config.json").write_text(text)
  model = huggingface.load_model(tmp_path, dtype="float32")
  assert model.config == config
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 6))
  logits = contiguous.forward(model, jnp.asarray(tokens))[0]
  want = checkpoints.logits(config, tensors, tokens[0])
  np.testing.assert_allclose(logits, want, **_BOUND)


def test_checkpoints_that_do_not_fit(tmp_path):
  config = checkpoints.variant("qwen2")
  tensors = checkpoints.random_tensors(config)
  with pytest.raises(FileNotFoundError, match="config.json"):
    huggingface.load_model(tmp_path)
  lacking = {n: x for n, x in tensors.items() if "0.mlp.up" not in n}
  with pytest.raises(ValueError, match=r"lacks 1 .*layers\.0\.mlp\.up_proj"):
    huggingface.from_tensors(config, lacking)
  with pytest.raises(ValueError, match="no place for"):
    huggingface.from_tensors(config, tensors | {"model.other.weight": 0})
  unbiased = dataclasses.replace(config, qkv_bias=False)
  with pytest.raises(ValueError, match=r"no place for.*k_proj\.bias"):
    huggingface.from_tensors(unbiased, tensors)
  bad = tensors | {"model.norm.weight": np.ones(3, np.float32)}
  with pytest.raises(ValueError, match=r"norm\.scale has shape \(3,\)"):
    huggingface.from_tensors(config, bad)
  with pytest.raises(ValueError, match="model_type 'gpt2'"):
    huggingface.parse_config(dict(model_type="gpt2"), "float32")


@pytest.mark.parametrize(
  "change, window",
  [
    (dict(max_window_layers=0), 8),
    (dict(use_sliding_window=False), None),
    (dict(max_window_layers=2), None),
    (dict(layer_types=["full_attention"] * 2), None),
    (dict(layer_types=["sliding_attention"] * 2, max_window_layers=9), 8),
  ],
)
def test_which_layers_have_a_window(change, window):
  values = _config_json(checkpoints.variant("qwen2"), "qwen2")
  values |= dict(use_sliding_window=True, sliding_window=8) | change
  assert huggingface.parse_config(values, "float32").window == window


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
     "layers are all of one kind"),
    (dict(use_sliding_window=True, sliding_window=8), "lacks sliding_window"),
    (dict(use_sliding_window=True, max_window_layers=0), "lacks sliding_win"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(rope_scaling=dict(rope_type="yarn")), "'yarn'"),
  ],
)
def test_configs_that_are_not_known(change, message):
  values = _config_json(checkpoints.variant("qwen2"), "qwen2")
  with pytest.raises(ValueError, match=message):
    huggingface.parse_config(values | change, "float32")


def test_configs_that_lack_something(tmp_path):
  values = _config_json(checkpoints.variant("qwen2"), "qwen2")
  del values["hidden_size"], values["rms_norm_eps"]
  with pytest.raises(ValueError, match="lacks hidden_size$"):
    huggingface.parse_config(values, "float32")
  (tmp_path / "config.json").write_text("{")
  (tmp_path / "x.safetensors").write_text("")
  with pytest.raises(ValueError, match=r"config\.json is no JSON"):
    huggingface.load_model(tmp_path)


def test_tokens_that_end_a_text(tmp_path):
  (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
  assert huggingface.eos_tokens(tmp_path) == (7,)
  text = '{"eos_token_id": [7, 9]}'
  (tmp_path / "generation_config.json").write_text(text)
  assert huggingface.eos_tokens(tmp_path) == (7, 9)
  for name in ("config.json", "generation_config.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match="states no eos_token_id"):
    huggingface.eos_tokens(tmp_path)


def test_older_checkpoints_hold_frequencies():
  config = checkpoints.variant("llama3")
  tensors = checkpoints.random_tensors(config)
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  huggingface.from_tensors(config, tensors | {name: np.ones(4)})
