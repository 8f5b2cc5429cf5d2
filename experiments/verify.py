"""The paged model against the standard one: same weights, same tokens.

    python -m experiments.verify --config=configs/verify.py:tiny
    python -m experiments.verify --config=configs/verify.py:tiny --break=mask

Compares the logits of the prefill, those of every decode step, and the cache
contents, over permuted, shared and combined tables; counts mismatches in four
tiers of tolerance. PASS needs Medium in float32, and in half precision errors
against float32 no larger than a naive attention's (experiments/common/
tolerance.py). --break spoils an argument of the paged path, which must FAIL.
Exit code 1 on FAIL.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import cli
from experiments.common import faults, records, verification


def main() -> int:
  values = flags.FLAGS
  return run(values.config, pathlib.Path(values.workdir), values["break"].value)


def run(config, workdir: pathlib.Path, fault: str | None = None) -> int:
  """Verifies, prints, writes the JSONL, and returns the exit code."""
  cli.need(config, "model", "tables", like="configs/verify.py")
  plan = verification.make_plan(config, fault)
  print(plan.headline, flush=True)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / f"{pathlib.Path(config.name).name}.jsonl"
  references = verification.references(plan)
  failed = []
  with records.fresh(path) as log:
    for result in verification.verify(plan, references):
      print(f"\n{result.describe()}", flush=True)
      log.write(json.dumps(result.as_dict() | dict(fault=fault)) + "\n")
      failed += [] if result.passed else [result.tables]
  print(f"\nwrote {path}")
  total = len(plan.tables)
  if failed:
    print(f"FAIL: {len(failed)} of {total} tables: {', '.join(failed)}")
    return 1
  print(f"PASS: {total} of {total} tables")
  return 0


if __name__ == "__main__":
  # Not above: a process that imports two mains would define them twice.
  config_flags.DEFINE_config_file("config")
  flags.DEFINE_enum(
    "break", None, faults.NAMES, "What to spoil in the paged path."
  )
  flags.DEFINE_string(
    "workdir", "out/verify", "Folder for <config name>.jsonl."
  )
  cli.run(main, config="configs/verify.py")
