"""Time attention shapes: ours and others, side by side, in one run.

    python -m experiments.bench --list
    python -m experiments.bench --shape=llama3-8b_dec_b64_c8192_p16_const
    python -m experiments.bench --shape=decode      (or prefill, mixed, shared,
                                                     write, cpu, all)
    python -m experiments.bench --shape=cpu_qwen2.5-0.5b_dec_b8_c2048_p16 \
        --implementations=xla,dense

Every implementation is held against the reference first. Then all of them are
timed in turn, so that a busy moment hits all alike:

    model us    per layer, of --steps layers that share a plan, each on the
                output of the one before, over the layers of one pool; launch
                gaps and the plan included: what a model feels. Decode on a GPU:
                rounds of that in a device loop, as tokens are generated
    kernel us   sum of CUPTI kernel times per layer (GPU only)

"hopper+batch_invariant" is hopper with a plan made with batch_invariant=True;
shared_prefix and memory_order go too. Others: dense and cudnn
(jax.nn.dot_product_attention on a contiguous cache), cudnn_paged (cuDNN's own
paging, private to JAX), jax_pallas (JAX's deprecated paged kernel), fa3
(FlashAttention-3, where the optional package flash-attn3-jax is installed);
what each is given: experiments/common/peers.py.
Write shapes time `write_kv`. Exit code 1 if one of ours is wrong.

A layer of some 10 us is launched more slowly than it runs, and its model time
is the host's. CUDA graphs help, as they do in a model; rows hold the flags:

    XLA_FLAGS=--xla_gpu_enable_command_buffer=+CUSTOM_CALL
"""

import pathlib

from absl import flags
import jax

from experiments import cli
from experiments.common import bench, bench_plot, cells, peers
from experiments.common import ceilings as ceilings_lib
from experiments.common import records as records_lib
from experiments.common import shapes as shapes_lib

_SHAPE = flags.DEFINE_list(
  "shape", ["cpu_tiny"],
  "Names from --list, or all, cpu, decode, prefill, mixed (with its parts), "
  "shared, write."
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", None,
  "Of ours (reference, xla, triton, hopper) and others (dense, cudnn, "
  "cudnn_paged, jax_pallas, fa3). Default: on a GPU hopper, triton, jax_pallas "
  "and cudnn (write: triton, xla); else xla, dense.",
)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Samples, at least.", 2)
_SECONDS = flags.DEFINE_float("seconds", 0.5, "Sampling time of each.", 0.0)
_STEPS = flags.DEFINE_integer(
  "steps", None, "Layers in the timed program. Default: 32, of prompts 8; on a "
  "CPU 4.", 1
)
_COLD_MB = flags.DEFINE_integer(
  "cold_mb", None,
  "MB the layers' K and V hold at least, to miss the caches. Default: 512, on "
  "a CPU 64.", 0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Of data and page order.", 0)
_WORKDIR = flags.DEFINE_string(
  "workdir", "out/bench", "Where bench.jsonl and the plots go."
)
_LIST = flags.DEFINE_bool("list", False, "List the shapes and stop.")


def main() -> int:
  if _LIST.value:
    print(bench.listing())
    return 0
  gpu = jax.default_backend() in ("gpu", "cuda")
  names = bench.select(_SHAPE.value)
  chosen = None
  if _IMPLEMENTATIONS.value is not None:
    chosen = bench.check_names(_IMPLEMENTATIONS.value)
  workdir = pathlib.Path(_WORKDIR.value)
  records = records_lib.Records(workdir / "bench.jsonl")
  shapes = [shapes_lib.named()[name] for name in names]
  ceilings = {
    dtype: ceilings_lib.measure(dtype) for dtype in {s.dtype for s in shapes}
  }
  for dtype, c in ceilings.items():
    print(
      f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ceilings: read "
      f"{c.read_gbps:.1f} GB/s, copy {c.copy_gbps:.1f} GB/s, {dtype} matmul "
      f"{c.matmul_tflops:.3g} TFLOP/s"
    )
  efforts = {phase: _effort(phase, gpu) for phase in shapes_lib.PHASES}
  rows = []
  for shape, mine in bench.run(
    shapes, chosen, ceilings=ceilings, efforts=efforts, seed=_SEED.value
  ):
    for row in mine:
      records.append(row)
    rows += mine
    print(bench.table(shape, mine), flush=True)
  print(bench.sums_of_parts(rows), end="")
  for path in (records.path, *bench_plot.plot(rows, workdir)):
    print(f"wrote {path}")
  return int(any(
    row["status"] in cells.FAILED and row["implementation"] not in peers.NAMES
    for row in rows
  ))


def _effort(phase: str, gpu: bool) -> cells.Effort:
  # A layer of a long prompt takes a millisecond: eight tell launch gaps.
  steps = 8 if phase in ("prefill", "mixed") else 32
  steps = _STEPS.value or (steps if gpu else 4)
  cold_mb = _COLD_MB.value
  if cold_mb is None:
    cold_mb = 512 if gpu else 64
  return cells.Effort(
    steps=steps,
    cold_bytes=cold_mb * 10**6,
    seconds=_SECONDS.value,
    repeats=_REPEATS.value,
    ahead=6 if gpu else 1,
    most_layers=steps,
    busy_us=20e3 if gpu else 0.0,
  )


if __name__ == "__main__":
  cli.run(main)
