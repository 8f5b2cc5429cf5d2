"""Lets tests import several experiments into one process.

Each experiment is a program, and programs share flag names (`--config`). Flags
of experiments imported for an earlier test module are forgotten before the next
one is imported; tests call functions, or run the program in a process.

And gives XLA's CPU client enough threads: each warpgroup of an interpreted
kernel blocks one while it waits at a barrier, so that two cores' worth of
threads can starve the third warpgroup for ever.
"""

import os

from absl import flags
import pytest

# Read by XLA when its CPU client starts, hence before any test module.
os.environ.setdefault("NPROC", "8")


def pytest_collectstart(collector):
  if not isinstance(collector, pytest.Module):
    return
  for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
    if module.startswith("experiments."):
      flags.FLAGS.remove_flag_values([flag.name for flag in defined])
