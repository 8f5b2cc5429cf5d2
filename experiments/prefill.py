"""A whole model's prefill, paged and standard side by side in one run.

    python -m experiments.prefill --config=configs/qwen.py --config.length=1500
    python -m experiments.prefill --config=configs/qwen.py:tiny
    python -m experiments.prefill --config=configs/qwen.py \
        --config.prefill.model=qwen2.5-7b --config.length=4096 \
        --config.prefill.gpu.batch=1

Standard is the same model over a contiguous cache; its attention is cuDNN's on
a GPU (`--config.prefill.gpu.standard=xla` for XLA's), XLA's on a CPU. Both, and
paged prefill in chunks, take turns: warm-ups first, then timed runs. Tokens/s
count the whole batch; `/ standard` is the median ratio of neighbouring runs.
The logits of each row's last token are compared too. Exit code 1 if they are
wrong.

On a GPU a second table follows: TFLOP/s and MFU, of FLOPs the model needs
(dense products and causal attention, counted once) and the matmul ceiling of
the run; the kernels' time (CUPTI) by what they do; and the share of attention:
its kernels' time over the median time of a call.
"""

import json
import pathlib

from absl import flags
import jax
from ml_collections import config_flags

from experiments import cli
from experiments.common import (
  ceilings,
  loading,
  model_work,
  prefilling,
  records,
  tolerance,
)


def main() -> int:
  values = flags.FLAGS
  return run(values.config, pathlib.Path(values.workdir))


def run(config, workdir: pathlib.Path) -> int:
  """Times, prints, writes the JSONL, and returns the exit code."""
  cli.need(config, "prefill", like="configs/qwen.py")
  plan = prefilling.make_plan(config)
  workdir.mkdir(parents=True, exist_ok=True)
  print(plan.headline, flush=True)
  timings = prefilling.run(plan)
  print(prefilling.table(timings))
  efficiency = _efficiency(plan, timings)
  if efficiency:
    print(model_work.table(efficiency))

  path = workdir / f"{pathlib.Path(config.name).name}.jsonl"
  batch, length = plan.tokens.shape
  with records.fresh(path) as log:
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
      row |= efficiency.get(timing.name, {})
      if timing.kernels is not None:
        row["kernels"] = [
          [name[:80], *rest] for name, rest in list(timing.kernels.items())[:12]
        ]
      if timing.logits is not None:
        row["logits"] = tolerance.as_dict(timing.logits)
      log.write(json.dumps(row) + "\n")
  print(f"wrote {path}")
  wrong = [t.name for t in timings if t.logits and not t.logits.passed]
  if wrong:
    print(f"FAIL: wrong logits: {', '.join(wrong)}")
    return 1
  return 0


def _efficiency(plan, timings):
  """Returns the figures of each path whose kernels were seen, by its name."""
  if any(timing.kernels is None for timing in timings):
    return {}
  work = model_work.of_prefill(plan.model.config, *plan.tokens.shape)
  ceiling = ceilings.measure(plan.model.config.dtype).matmul_tflops
  return {
    timing.name: model_work.figures(
      work,
      timing.figures(timings[0])["median_ms"],
      timing.kernels,
      ceiling,
    )
    for timing in timings
  }


if __name__ == "__main__":
  # Not above: a process that imports two mains would define them twice.
  config_flags.DEFINE_config_file("config")
  flags.DEFINE_string(
    "workdir", "out/prefill", "Folder for <config name>.jsonl."
  )
  cli.run(main, config="configs/qwen.py")
