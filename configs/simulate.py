"""Paged attention as a task graph on a simulated chip, all public cases by id.

    python -m experiments.simulate                       # cases that fit a CPU
    python -m experiments.simulate --config=configs/simulate.py:tiny
    python -m experiments.simulate --config=configs/simulate.py:sim-prod1
    python -m experiments.simulate --config.case=all --config.execute=none

Cost on two CPU cores: a minute; `:tiny` half of that; `:sim-prod1` (65,536
tasks, scheduled only) 20 s. Expected: every `out:` line PASS, replay deviations
near 0 %, and in the comparison unrolled graphs ahead where units are short and
split graphs ahead where one long sequence has the chip to itself.
"""

import ml_collections
from ml_collections import config_dict

from paged_jax.simulate import cases


def get_config(which: str = "default") -> ml_collections.ConfigDict:
  """Returns the config; `which` is default, tiny, or case ids."""
  config = ml_collections.ConfigDict()

  # Every public case, for the reader: `--config.case=` takes any of these, a
  # comma-separated list, or the words all, cpu (they fit a CPU) and gpu.
  config.cases = cases.simulated_ids()
  config.case = {
    "default": "cpu,sim-prod1",
    "tiny": "sim-readme,sim-small-tail33,sim-varseq4,mgx-decode,sim-prod1",
  }.get(which, which)

  # Override the shape of the chosen cases; None keeps what was published.
  config.batch = config_dict.placeholder(int)
  config.query_heads = config_dict.placeholder(int)
  config.kv_heads = config_dict.placeholder(int)
  config.head_dim = config_dict.placeholder(int)
  config.block = config_dict.placeholder(int)  # tokens
  config.context = config_dict.placeholder(str)  # tokens, "33" or "33,17"
  config.dtype = config_dict.placeholder(str)

  # Graphs: serial, unrollN (N blocks a task), splitN (N chains, tree merge).
  config.variants = "serial,unroll4,split4"
  # Which ready task goes first: order, fifo or critical.
  config.policy = "order"
  # Stage kernels: jnp (jitted) or pallas (interpreted).
  config.stages = "jnp"
  # Run the kernels on threads for: cpu (cases that fit), all or none.
  config.execute = "cpu"
  config.seed = 0
  # Simulated from measured task times against the threaded run, a fraction.
  config.replay_tolerance = 0.15

  # One thread a unit; two and two suit two cores.
  config.threads = ml_collections.ConfigDict()
  config.threads.matrix_units = 2
  config.threads.vector_units = 2

  # The simulated chip: rates of one unit, in the class of accelerators with
  # separate matrix and vector cores. A model, not a measurement.
  config.chip = ml_collections.ConfigDict()
  config.chip.matrix_units = 24
  config.chip.vector_units = 48
  config.chip.matrix_gflops = 12_000.0  # 1e9 FLOP/s
  config.chip.vector_gflops = 250.0  # 1e9 FLOP/s
  config.chip.matrix_gbps = 60.0  # 1e9 bytes/s
  config.chip.vector_gbps = 60.0  # 1e9 bytes/s
  config.chip.launch_us = 1.0  # us, every task

  # The comparison of variants, under the cost model alone.
  config.study = ml_collections.ConfigDict()
  config.study.case = "sim-prod1"  # its heads, head dim, block and dtype
  config.study.variants = "serial,unroll4,split8,unroll4+split8"
  config.study.batches = (1, 8, 64)
  config.study.contexts = (512, 2048, 8192, 32768)  # tokens
  config.study.matrix_units = 1  # smallest chip
  config.study.vector_units = 2
  config.study.scales = (1, 6, 24)  # times these
  if which == "tiny":
    config.study.batches = (1, 8)
    config.study.contexts = (512, 2048, 8192)

  # A trace is about 250 bytes a task.
  config.trace = True
  config.timeline = True
  return config
