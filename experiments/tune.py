"""Regenerate the tuning table of the Hopper decode kernel on this GPU.

    python -m experiments.tune --workdir=out/tune
    python -m experiments.tune --shape=qwen2.5-0.5b_dec_b64_c4096_p16_const

Tries tile and bundle sizes on the stored decode shapes, keeps every time in
tune.jsonl (a second start goes on where the first one stopped) and writes
hopper_decode.json: one row for each geometry where something beats the rule of
`paged_jax/ops/hopper_tuning.py` by more than 1 %. `--install` puts it where the
library reads it, paged_jax/data/. About a minute a shape on an H100.
"""

import json
import pathlib

from absl import flags
import jax

from experiments import cli
from experiments.common import bench, cells, records, shapes, tuning
from paged_jax import data

_SHAPE = flags.DEFINE_list("shape", ["decode"], "As in experiments.bench.")
_WORKDIR = flags.DEFINE_string("workdir", "out/tune", "Where the files go.")
_INSTALL = flags.DEFINE_bool("install", False, "Replace the library's table.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Samples, at least.", 2)
_SECONDS = flags.DEFINE_float("seconds", 0.3, "Sampling time of each.", 0.0)
_STEPS = flags.DEFINE_integer("steps", 16, "Layers in the timed program.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of data and page order.", 0)


def main(argv) -> int:
  if len(argv) > 1:
    raise ValueError(f"unknown argument {argv[1]!r}: flags start with --")
  if jax.default_backend() not in ("gpu", "cuda"):
    raise RuntimeError("tuning needs the GPU that the table is for")
  chosen = [
    shape
    for shape in (shapes.named()[name] for name in bench.select(_SHAPE.value))
    if shape.phase == "decode" and shape.dtype != "float32"
  ]
  effort = cells.Effort(
    steps=_STEPS.value, cold_bytes=512 * 10**6, seconds=_SECONDS.value,
    repeats=_REPEATS.value, ahead=1, most_layers=_STEPS.value,
  )
  workdir = pathlib.Path(_WORKDIR.value)
  log = records.Records(workdir / "tune.jsonl")
  done = {row["name"] for row in log.rows()}
  for i, shape in enumerate(chosen):
    print(f"[{i + 1}/{len(chosen)}] {shape.name}", flush=True)
    if shape.name in done:
      continue
    for row in tuning.run([shape], effort, _SEED.value):
      log.append(row)
      what = row.get("error") or (
        f"{row['us']:9.1f} us, model {row['median_us']:9.1f} us"
      )
      print(f"  {json.dumps(row['set']):28}{what}"
            f"{row.get('ratio', 1):8.3f}", flush=True)
  table = dict(
    about=[
      "Overrides of the rule in hopper_tuning.py, by geometry: what "
      "experiments/tune.py measured to beat it. ratio: time over the rule's."
    ],
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    rows=tuning.winners(log.rows()),
  )
  target = workdir / "hopper_decode.json"
  if _INSTALL.value:
    target = pathlib.Path(data.__file__).parent / "hopper_decode.json"
  rows = ",\n  ".join(json.dumps(row) for row in table.pop("rows"))
  head = json.dumps(table, indent=1)[:-2]
  target.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
  print(f"times: {log.path}, table: {target}")
  return 0


if __name__ == "__main__":
  cli.run(main)
