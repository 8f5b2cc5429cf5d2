"""A whole model's prefill, paged and standard side by side in one run.

    python -m experiments.prefill --config=configs/qwen.py --config.length=1500
    python -m experiments.prefill --config=configs/qwen.py:tiny

Standard is the same model over a contiguous cache. Both, and paged prefill in
chunks, take turns: warm-ups first, then timed runs. Tokens/s count the whole
batch; `/ standard` is the median ratio of neighbouring runs. The logits of each
row's last token are compared too. Exit code 1 if they are wrong.
"""

from collections.abc import Sequence
import json
import pathlib

from absl import flags
import jax
from ml_collections import config_flags

from experiments import cli
from experiments.common import loading, prefilling, tolerance


def main(argv: Sequence[str]) -> int:
  if argv[1:]:
    raise ValueError(f"unknown argument {argv[1]!r}: flags start with --")
  values = flags.FLAGS
  return run(values.config, pathlib.Path(values.workdir))


def run(config, workdir: pathlib.Path) -> int:
  """Times, prints, writes the JSONL, and returns the exit code."""
  if "prefill" not in config:
    raise ValueError("the config has no section prefill: see configs/qwen.py")
  plan = prefilling.make_plan(config)
  print(plan.headline, flush=True)
  timings = prefilling.run(plan)
  print(prefilling.table(timings))

  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / f"{pathlib.Path(config.name).name}.jsonl"
  batch, length = plan.tokens.shape
  with path.open("w") as log:
    for timing in timings:
      row = timing.figures(timings[0]) | dict(
        ms=timing.ms,
        model=plan.headline.split(",")[0],
        dtype=plan.model.config.dtype,
        batch=batch,
        length=length,
        page_size=plan.page_size,
        device=loading.device(),
        jax=jax.__version__,
      )
      if timing.logits is not None:
        row["logits"] = tolerance.as_dict(timing.logits)
      log.write(json.dumps(row) + "\n")
  print(f"wrote {path}")
  wrong = [t.name for t in timings if t.logits and not t.logits.passed]
  if wrong:
    print(f"FAIL: wrong logits: {', '.join(wrong)}")
    return 1
  return 0


if __name__ == "__main__":
  # Not above: a process that imports two mains would define them twice.
  config_flags.DEFINE_config_file("config")
  flags.DEFINE_string(
    "workdir", "out/prefill", "Folder for <config name>.jsonl."
  )
  cli.run(main, config="configs/qwen.py")
