"""Page size x GQA ratio over the head geometries of Qwen.

    python -m experiments.sweep --config=configs/qwen.py
    python -m experiments.sweep --config=configs/qwen.py:tiny

Time: two minutes on 2 CPU cores, nearly all of it compilation; on an H100 six
minutes for `triton` and `xla`, `hopper` comes on top; tiny half a minute.

Result: every cell ok, exit code 0, out/sweep/qwen/report.html. On a CPU 22
cells of `xla` are timed and 16 of `triton` are interpreted: verified, no speed.
On a GPU there are 270 cells.
"""

from ml_collections import config_dict

_VARIANTS = ("", "tiny")

# Name, N query heads, K kv heads, H head dim, from the models' own config.json.
# Qwen3-4B and -8B (32, 8, 128) are the ratio axis at 4, Qwen3-30B-A3B
# (32, 4, 128) at 8.
_GEOMETRIES = (
  ("qwen2.5-0.5b", 14, 2, 64),
  ("qwen2.5-7b", 28, 4, 128),
  ("qwen3-0.6b", 16, 8, 128),
  ("qwen3-14b", 40, 8, 128),
  ("qwen3-32b", 64, 8, 128),
)


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the sweep; `tiny` is the same path in under a minute."""
  if variant not in _VARIANTS:
    raise ValueError(
      f"configs/qwen.py has no variant {variant!r}: use configs/qwen.py or "
      "configs/qwen.py:tiny"
    )
  config = config_dict.ConfigDict()
  config.name = "qwen"
  config.source = "random"
  config.text = ""
  config.seed = 0
  config.phases = ("decode", "prefill")
  config.page_sizes = (8, 16, 32, 64, 128, 256)
  config.ratios = (1, 2, 4, 8, 16)
  config.ratio_heads = 32
  config.ratio_head_dim = 128
  config.geometries = _GEOMETRIES

  config.gpu = gpu = config_dict.ConfigDict()
  gpu.implementations = ("hopper", "triton", "xla")
  gpu.dtype = "bfloat16"
  gpu.distribution = "ragged"
  gpu.page_sizes = config.page_sizes
  gpu.ratios = config.ratios
  gpu.geometry_page_sizes = (16, 64, 256)
  gpu.interpret_page_sizes = ()
  gpu.decode_batch = 32
  gpu.decode_context = 4096
  gpu.prefill_batch = 4
  gpu.prefill_context = 4096
  gpu.steps = 8
  gpu.cold_mb = 256  # five times the L2 of an H100
  gpu.seconds = 0.05
  gpu.repeats = 5
  gpu.ahead = 12

  config.cpu = cpu = config_dict.ConfigDict()
  cpu.implementations = ("xla", "triton")
  cpu.dtype = "float32"
  cpu.distribution = "ragged"
  cpu.page_sizes = (16, 128)
  cpu.ratios = (1, 4, 16)
  cpu.geometry_page_sizes = (16,)
  cpu.interpret_page_sizes = (16,)
  cpu.decode_batch = 4
  cpu.decode_context = 512
  cpu.prefill_batch = 2
  cpu.prefill_context = 192
  cpu.steps = 1
  cpu.cold_mb = 64
  cpu.seconds = 0.2
  cpu.repeats = 5
  cpu.ahead = 4

  config.length = 1500  # tokens of each prompt of the prefill
  config.prefill = prefill = config_dict.ConfigDict()
  prefill.model = "qwen2.5-0.5b"  # a name of paged_jax.models.config
  prefill.weights = "random"  # or smollm2, or a path
  prefill.page_size = 16
  prefill.chunks = (256, 512)  # tokens of a row a step
  prefill.implementation = config_dict.placeholder(str)  # None: automatic
  prefill.gpu = config_dict.ConfigDict()
  prefill.gpu.dtype = "bfloat16"
  # Of jax.nn.dot_product_attention in the standard path: xla or cudnn.
  prefill.gpu.standard = "cudnn"
  prefill.gpu.num_layers = config_dict.placeholder(int)  # None: all
  prefill.gpu.batch, prefill.gpu.warmup, prefill.gpu.repeats = 4, 3, 20
  prefill.cpu = config_dict.ConfigDict()
  prefill.cpu.dtype, prefill.cpu.standard = "float32", "xla"
  prefill.cpu.num_layers = 1
  prefill.cpu.batch, prefill.cpu.warmup, prefill.cpu.repeats = 1, 1, 5

  if variant == "tiny":
    config.length = 100
    prefill.model = "tiny"
    prefill.chunks = (16, 48)
    prefill.cpu.num_layers, prefill.cpu.batch = None, 2
    config.name = "qwen_tiny"
    config.page_sizes = (8, 32)
    config.ratios = (1, 4)
    config.ratio_heads = 4
    config.ratio_head_dim = 64
    config.geometries = _GEOMETRIES[:1]
    cpu.page_sizes, cpu.geometry_page_sizes = (8, 32), ()
    cpu.ratios, cpu.interpret_page_sizes = (4,), (8, 32)
    cpu.decode_batch, cpu.decode_context = 2, 70
    cpu.prefill_batch, cpu.prefill_context = 2, 20
    cpu.seconds, cpu.repeats, cpu.cold_mb = 0.02, 3, 1
    gpu.geometry_page_sizes = (32,)
    gpu.decode_context = gpu.prefill_context = 512
  return config
