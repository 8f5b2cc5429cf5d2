"""How long a compiled program takes, on a CPU and on a GPU.

Two clocks, and what each one sees:

    wall     host clock around calls queued back to back; with many layers a
             call: what a model feels (launch gaps count)
    kernels  CUPTI's times of the kernels alone, summed; GPU only

A host clock around one call on a GPU measures the host: dispatching it and
waking up after the wait take up to a millisecond. So there a sample is the
pace of a pipeline. Some calls are always queued, the host waits for the oldest
one and queues another, and

    (when call i + n was done - when call i was done) / n

is what a call takes: each wake-up is late by about the same, and the GPU, which
never idles, does not notice.

A GPU that multiplies for longer than some 20 ms reaches its power limit and
lowers its clocks, by a tenth and more and never twice by as much: what is
compared would be the order of the samples. So where much is multiplied (`cool`,
see `Ceilings.heats`) samples are short, of programs of a few ms, and the GPU
rests after each, as it does while the ceilings are measured.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import time

import jax
import numpy as np

try:
  from jax.experimental.mosaic.gpu import profiler
except ImportError:  # a jaxlib without Mosaic GPU
  profiler = None

_WINDOW = 0.06  # seconds of a sample on a GPU
_QUEUED = 0.008  # seconds of work that are always queued
_MOST = (20, 200)  # calls queued, calls of a sample
_SHORT = 0.25  # samples of `cool` are that much shorter
_REST = 0.05  # seconds between them


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
  cool: bool = False,
) -> dict[str, Timing]:
  """Times calls in turn, so that a busy moment of the host hits all alike.

  Args:
    calls: by name; each queues one program and returns its outputs, which no
      later call may donate. They must have run once before (compilation is not
      what is timed).
    steps: units of work in a call; times are per step.
    repeats: least samples a call.
    seconds: time to spend on each call, at least.
    cool: whether a GPU may rest between samples; see the module.

  Returns:
    Timing by name, per step.
  """
  on_gpu = jax.default_backend() != "cpu"
  sizes = dict.fromkeys(calls, (0, 0))  # queued calls, calls of a sample
  if on_gpu:
    for name, call in calls.items():
      sizes[name] = _sizes(_pace(call, 1, 1), cool)
      queued, count = sizes[name]
      sizes[name] = _sizes(_pace(call, queued, -(-count // 4)), cool)
  samples = {name: [] for name in calls}
  end = time.perf_counter() + seconds * len(calls)
  rounds = 0
  while rounds < repeats or time.perf_counter() < end:
    for name, call in calls.items():
      if on_gpu and cool:
        time.sleep(_REST)
      samples[name].append(_pace(call, *sizes[name]) * 1e6 / steps)
    rounds += 1
  return {name: summarise(values) for name, values in samples.items()}


def _sizes(each, cool):
  each /= _SHORT if cool else 1
  return tuple(
    int(np.clip(np.ceil(span / each), 1, most))
    for span, most in zip((_QUEUED, _WINDOW), _MOST)
  )


def _pace(call, queued, count):
  """Seconds a call takes: of `count` with `queued` others behind, or alone."""
  if not count:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
  pending, done = collections.deque(), []
  for _ in range(2 * queued + count + 1):  # the first ones fill the queue
    pending.append(call())
    if len(pending) > queued:
      jax.block_until_ready(pending.popleft())
      done.append(time.perf_counter())
  jax.block_until_ready(list(pending))
  return (done[-1] - done[-1 - count]) / count


def kernels(
  call: Callable[[], object],
  *,
  steps: int = 1,
  repeats: int = 10,
  cool: bool = False,
) -> tuple[Timing, dict[str, tuple[float, float]]] | None:
  """Sums the GPU kernels of a call.

  Args:
    call: queues one compiled program and returns its outputs.
    steps: units of work in a call; times are per step.
    repeats: samples.
    cool: whether the GPU may rest between them; see the module.

  Returns:
    (timing per step, {kernel name: (launches per step, us per step)}), or None
    without a GPU or without CUPTI.
  """
  if profiler is None or jax.default_backend() == "cpu":
    return None
  runs = _profile(call, repeats, _REST if cool else 0.0)
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


def _profile(call, repeats, rest):
  """Returns [(kernel name, ms), ...] of each call; [] if CUPTI is silent."""
  # `profiler.measure` would do but for donated arguments, which it passes
  # again, and kernels on several streams, whose order it wants to be fixed.
  cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
  jax.block_until_ready(call())
  cupti._cupti_init()
  try:
    for _ in range(repeats):
      time.sleep(rest)
      jax.block_until_ready(call())
  finally:
    found = cupti._cupti_get_timings(True) or []
  each, rest = divmod(len(found), repeats)
  if rest:  # some launches were not recorded: no telling which
    return _profile(call, 1, rest) if repeats > 1 else []
  return [found[i * each : (i + 1) * each] for i in range(repeats) if each]
