"""How long a compiled program takes, on a CPU and on a GPU.

Two clocks, and what each one sees:

    wall     host clock around calls queued back to back, one wait at the end;
             with many layers a call: what a model feels (launch gaps count)
    kernels  CUPTI's times of the kernels alone, summed; GPU only

A host clock around one call on a GPU measures the host: never done here.
"""

from collections.abc import Callable, Mapping
import dataclasses
import time

import jax
import numpy as np

try:
  from jax.experimental.mosaic.gpu import profiler
except ImportError:  # a jaxlib without Mosaic GPU
  profiler = None

_MAX_QUEUED = 20  # calls in flight before one wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Median and interquartile range over repeats, in us."""

  median_us: float
  iqr_us: float
  repeats: int


def summarise(samples_us) -> Timing:
  """Returns the median and IQR of samples in us."""
  low, median, high = np.percentile(samples_us, [25, 50, 75])
  return Timing(
    median_us=float(median),
    iqr_us=float(high - low),
    repeats=len(samples_us),
  )


def wall(
  calls: Mapping[str, Callable[[], object]],
  *,
  steps: int = 1,
  repeats: int = 10,
  seconds: float = 0.3,
) -> dict[str, Timing]:
  """Times calls in turn, so that a busy moment of the host hits all alike.

  Args:
    calls: by name; each queues one program and returns its outputs. They must
      have run once before (compilation is not what is timed).
    steps: units of work in a call; times are per step.
    repeats: least samples a call.
    seconds: time to spend on each call, at least.

  Returns:
    Timing by name, per step.
  """
  on_gpu = jax.default_backend() != "cpu"
  queued = dict.fromkeys(calls, 1)
  if on_gpu:  # so many calls in a sample that it lasts some 5 ms
    for name, call in calls.items():
      guess = _sample(call, 2)
      queued[name] = int(np.clip(5e-3 / max(guess, 1e-9), 1, _MAX_QUEUED))
  samples = {name: [] for name in calls}
  end = time.perf_counter() + seconds * len(calls)
  rounds = 0
  while rounds < repeats or time.perf_counter() < end:
    for name, call in calls.items():
      samples[name].append(_sample(call, queued[name]) * 1e6 / steps)
    rounds += 1
  return {name: summarise(values) for name, values in samples.items()}


def _sample(call, count):
  start = time.perf_counter()
  outputs = [call() for _ in range(count)]
  jax.block_until_ready(outputs[-1])
  return (time.perf_counter() - start) / count


def kernels(
  compiled, *args, steps: int = 1, repeats: int = 10
) -> tuple[Timing, dict[str, tuple[float, float]]] | None:
  """Sums the GPU kernels of a compiled program.

  Args:
    compiled: a jitted or compiled function.
    *args: its arguments.
    steps: units of work in a call; times are per step.
    repeats: samples.

  Returns:
    (timing per step, {kernel name: (launches per step, us per step)}), or None
    without a GPU or without CUPTI.
  """
  if profiler is None or jax.default_backend() == "cpu":
    return None
  runs = _profile(compiled, args, repeats)
  if not runs:
    return None
  totals = [1e3 * sum(ms for _, ms in run) / steps for run in runs]
  names: dict[str, list[float]] = {}
  for name, ms in runs[len(runs) // 2]:
    names.setdefault(name, []).append(1e3 * ms)
  by_name = {
    name: (len(times) / steps, sum(times) / steps)
    for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))
  }
  return summarise(totals), by_name


def _profile(compiled, args, repeats):
  """Returns [(kernel name, ms), ...] for each repeat; [] if CUPTI is silent."""
  try:
    measured = profiler.measure(
      compiled, aggregate=False, iterations=max(repeats, 2)
    )
    return measured(*args)[1] or []
  except RuntimeError:
    # Kernels on several streams may finish in another order each time.
    one = profiler.measure(compiled, aggregate=False)
    runs = [one(*args)[1] for _ in range(min(repeats, 3))]
    return [run for run in runs if run]
