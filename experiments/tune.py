"""Regenerate the tuning table of the Hopper decode kernel on this GPU.

    export XLA_FLAGS=--xla_gpu_enable_command_buffer=+CUSTOM_CALL
    python -m experiments.tune --workdir=out/tune
    python -m experiments.tune --shape=qwen2.5-0.5b_dec_b64_c4096_p16_const

Tries tile and bundle sizes, stages and CTAs an SM on the stored
decode shapes, keeps every time in tune.jsonl (a second start goes on where the
first one stopped) and writes hopper_decode.json: one row for each geometry
where something beats the rule of `paged_jax/ops/hopper_tuning.py` by more than
1 %; a geometry whose shapes are not all timed keeps the row it has. `--install`
puts it where the library reads it, paged_jax/data/.

With the flag above launches are in CUDA graphs and model time decides; without,
the kernels' time. On an H100 with 16 cores: all shapes in 4 minutes.
"""

import json
import os
import pathlib
import time

from absl import flags
import jax

from experiments import cli
from experiments.common import bench, cells, records, shapes, tuning
from paged_jax import data

_SHAPE = flags.DEFINE_list("shape", ["decode"], "As in experiments.bench.")
_WORKDIR = flags.DEFINE_string("workdir", "out/tune", "Where the files go.")
_INSTALL = flags.DEFINE_bool("install", False, "Replace the library's table.")
_REPEATS = flags.DEFINE_integer("repeats", 4, "Samples, at least.", 2)
_SECONDS = flags.DEFINE_float("seconds", 0.1, "Sampling time of each.", 0.0)
_STEPS = flags.DEFINE_integer(
  "steps", 32, "Layers in the timed program; a quarter if they are long.", 1
)
_MINUTES = flags.DEFINE_float(
  "minutes", 4.0, "No shape is begun when so much has passed.", 0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of data and page order.", 0)


def main() -> int:
  # Several processes share the GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if jax.default_backend() not in ("gpu", "cuda"):
    raise RuntimeError("tuning needs the GPU that the table is for")
  stored = [shapes.named()[name] for name in bench.select(["decode"])]
  stored = [shape for shape in stored if shape.dtype != "float32"]
  names = bench.select(_SHAPE.value)
  workdir = pathlib.Path(_WORKDIR.value)
  log = records.Records(workdir / "tune.jsonl")
  done = {row["name"] for row in log.rows()}
  chosen = [x for x in stored if x.name in names and x.name not in done]
  effort = cells.Effort(
    steps=_STEPS.value, cold_bytes=512 * 10**6, seconds=_SECONDS.value,
    repeats=_REPEATS.value, ahead=1, most_layers=_STEPS.value,
    busy_us=10e3,
  )
  started = time.monotonic()

  def say(text):
    print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

  say(f"{len(chosen)} shapes, {len(done)} done before")
  for rows in tuning.run(
    chosen, effort, _SEED.value, seconds=60 * _MINUTES.value, say=say
  ):
    for row in rows:
      log.append(row)
    say(rows[0]["name"] + "".join(map(_line, rows)))
  library = pathlib.Path(data.__file__).parent / "hopper_decode.json"
  old = json.loads(library.read_text())
  table = dict(
    about=old["about"],
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
  )
  found = tuning.table(log.rows(), old["rows"], stored)
  target = library if _INSTALL.value else workdir / "hopper_decode.json"
  rows = ",\n  ".join(json.dumps(row) for row in found)
  head = json.dumps(table, indent=1)[:-2]
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
  say(f"times: {log.path}, table: {target}")
  return 0


def _line(row):
  times = row.get("error")
  if "us" in row:
    kernel = row.get("kernel_us", float("nan"))
    times = f"model {row['median_us']:8.2f} us (+- {row['iqr_us']:5.2f}), " \
            f"kernels {kernel:8.2f} us, ratio {row.get('ratio', 1):6.3f}"
  return f"\n    {json.dumps(row['set']):44}{times}"


if __name__ == "__main__":
  cli.run(main)
