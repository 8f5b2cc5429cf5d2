"""Cells of a sweep: compile ahead in threads, then verify, time, record.

    shapes     s0            s1            s2 ...
    threads    compile all programs of the next few shapes
    main       (idle)        s0: data, truth, then every implementation
                             s1: ...

Timing never overlaps compilation: on two cores it would be noise.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import importlib.metadata
import itertools
import math
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import ceilings as ceilings_lib
from experiments.common import problem as problem_lib
from experiments.common import programs, shapes, timing, verify

FAILED = ("wrong", "failed")

# The truth is run once: trying many matmul algorithms on it is wasted.
_MOST_ROUNDS = 100
_LONGEST_US = 24e3  # of a timed program of more than two layers
_COOL_US = 3e3  # likewise, where more would reach the power limit
_QUICK = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One implementation on one shape.

  Attributes:
    group: "ratio axis" or the name of a model's geometry.
    shape: the call.
    implementation: one of `paged_jax.ops.implementations.NAMES`.
    interpret: whether the kernel is interpreted: verified, never timed.
  """

  group: str
  shape: shapes.Shape
  implementation: str
  interpret: bool = False

  @property
  def mode(self) -> str:
    return "interpret" if self.interpret else "native"

  @property
  def key(self) -> str:
    device = jax.devices()[0].device_kind.replace(" ", "_")
    return "/".join((
      self.shape.name, self.implementation, self.mode, device,
      f"jax-{jax.__version__}",
    ))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
  """How much work goes into a cell.

  Attributes:
    steps: attention layers in a timed program.
    cold_bytes: the pools of all layers hold at least this, to miss the caches.
    seconds: time of the samples of a cell, at least.
    repeats: samples, at least.
    ahead: shapes compiled at once.
    most_layers: L at most.
    busy_us: how long a timed program of decode layers is to run, at least;
      rounds of the layers are added until it should.
  """

  steps: int
  cold_bytes: int
  seconds: float
  repeats: int
  ahead: int
  most_layers: int = 32
  busy_us: float = 0.0

  def layers(self, shape: shapes.Shape) -> int:  # L
    return programs.pool_layers(shape, self.cold_bytes, self.most_layers)

  def of(self, limit_us: float, cool: bool = False) -> "Effort":
    """Returns it with fewer steps where a layer takes at least `limit_us`.

    cool: whether the GPU is to stay below its power limit; see `timing`.
    """
    longest = _COOL_US if cool else _LONGEST_US
    steps = min(self.steps, int(max(longest / limit_us, 2)))
    layers = min(self.most_layers, steps)  # else a program visits a part only
    return dataclasses.replace(self, steps=steps, most_layers=layers)

  def rounds(self, shape: shapes.Shape) -> int:
    """How often a timed program visits its layers."""
    if not shape.decode:
      return 1
    least = self.steps * max(shape.bytes / 3e6, 2.0)  # at 3000 GB/s, in us
    return min(max(math.ceil(self.busy_us / least), 1), _MOST_ROUNDS)

  def takes_first(self, shape: shapes.Shape) -> bool:
    """Whether a program is told where to begin: it visits a part of L."""
    return self.steps < self.layers(shape)


def run(
  cells: Sequence[Cell],
  *,
  source: problem_lib.Source,
  effort: Effort,
  ceilings: ceilings_lib.Ceilings,
) -> Iterator[dict[str, Any]]:
  """Yields a row for every cell; whatever a cell does, the next one follows.

  Args:
    cells: cells of one shape must stand together.
    source: of queries, keys and values.
    effort: how much work goes into a cell.
    ceilings: of this run.
  """
  groups = [list(g) for _, g in itertools.groupby(cells, lambda c: c.shape)]
  pool = futures.ThreadPoolExecutor(os.cpu_count())
  try:
    for start in range(0, len(groups), effort.ahead):
      batch = groups[start : start + effort.ahead]
      jobs = [
        compile_ahead(pool, group[0].shape, group, effort) for group in batch
      ]
      futures.wait([f for job in jobs for f in job.values()])
      for group, job in zip(batch, jobs):
        yield from _run_shape(group, job, source, effort, ceilings)
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def compile_ahead(
  pool: futures.Executor,
  shape: shapes.Shape,
  group: Sequence[Cell],
  effort: Effort,
) -> dict[str, futures.Future]:
  """Returns futures of the compiled programs of one shape, by name.

  Args:
    pool: of threads.
    shape: the call.
    group: cells of the shape.
    effort: how much work goes into a cell.

  Returns:
    "write" (`problem.writer`), "exact", "naive" in half precision, and each
    cell's chain by the name of its implementation. A chain takes
    (state, query), and where it visits fewer layers than there are, the first.
  """
  layers = effort.layers(shape)
  spec = problem_lib.specs(shape, layers)
  state = {k: v for k, v in spec.items() if k not in ("query", "k", "v")}
  dtype = verify.precise_dtype()

  def exact():
    with verify.precision(dtype):
      program = verify.exact(shape, dtype)
      return program.lower(state, spec["query"]).compile(_QUICK)

  def naive():
    program = verify.naive(shape)
    args = (spec[name] for name in ("query", "k", "v", "sinks"))
    return program.lower(*args).compile(_QUICK)

  def one(cell):
    program = programs.chain(
      programs.ours(shape, cell.implementation, cell.interpret or None),
      layers=layers,
      steps=1 if cell.interpret else effort.steps,
      rounds=1 if cell.interpret else effort.rounds(shape),
    )
    first = jax.ShapeDtypeStruct((), np.int32)
    args = (first,) if effort.takes_first(shape) else ()
    return program.lower(state, spec["query"], *args).compile()

  jobs = {
    "write": pool.submit(problem_lib.writer, shape, layers),
    "exact": pool.submit(exact),
  }
  if shape.dtype != "float32":
    jobs["naive"] = pool.submit(naive)
  for cell in group:
    jobs[cell.implementation] = pool.submit(one, cell)
  return jobs


def _run_shape(group, jobs, source, effort, ceilings):
  shape = group[0].shape
  started = time.perf_counter()
  try:
    problem = problem_lib.build(
      shape,
      layers=effort.layers(shape),
      source=source,
      write=jobs["write"].result(),
    )
    naive = jobs["naive"].result() if "naive" in jobs else None
    want, rounded = truth(problem, jobs["exact"].result(), naive)
    broken = None
  except Exception as error:  # the cell's fault or ours: either way recorded
    broken = error
  for cell in group:
    row = describe(cell, ceilings)
    try:
      if broken is not None:
        raise broken
      compiled = jobs[cell.implementation].result()
      args = (np.int32(0),) if effort.takes_first(shape) else ()
      first, _ = compiled(problem.state, problem.query, *args)
      verdict = verify.check(first, want, rounded, shape)
      row.update(dataclasses.asdict(verdict))
      row.update(status="ok" if verdict.passed else "wrong")
      row["error"] = row.pop("problem")
      if verdict.passed and not cell.interpret:
        row.update(_time(compiled, problem, effort, ceilings))
    except NotImplementedError as error:
      row.update(status="unsupported", error=one_line(error))
    except Exception as error:
      row.update(status="failed", error=one_line(error))
    row["seconds"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    yield plain(row)


def truth(problem, exact, naive):
  """Returns (reference in high precision, naive in the dtype or None)."""
  with verify.precision(verify.precise_dtype()):
    want = exact(problem.state, problem.query)
  if naive is None:
    return want, None
  return want, naive(problem.query, problem.k, problem.v, problem.sinks)


def describe(cell: Cell, ceilings: ceilings_lib.Ceilings) -> dict[str, Any]:
  """Returns the fields of a row that are known before it runs."""
  shape = cell.shape
  row = dict(
    key=cell.key,
    status="failed",
    group=cell.group,
    implementation=cell.implementation,
    mode=cell.mode,
    ratio=shape.group_size,
  )
  row |= dataclasses.asdict(shape)
  row |= dict(
    num_tokens=shape.num_tokens,
    num_kv_tokens=shape.num_kv_tokens,
    waste=shape.waste,
    bytes=shape.bytes,
    flops=shape.flops,
    limit_us=ceilings.limit_us(shape.bytes, shape.flops),
    bound_by=ceilings.bound_by(shape.bytes, shape.flops),
  )
  return row | dataclasses.asdict(ceilings) | versions()


def rates(median_us: float, row: dict[str, Any]) -> dict[str, float]:
  """Returns GB/s, TFLOP/s and the fraction of the ceiling that a time means."""
  return dict(
    gbps=row["bytes"] / median_us / 1e3,
    tflops=row["flops"] / median_us / 1e6,
    ceiling_fraction=row["limit_us"] / median_us,
  )


def versions() -> dict[str, str]:
  """Returns the versions and the device that a number depends on."""
  return dict(
    device=jax.devices()[0].device_kind,
    cores=os.cpu_count(),
    python=platform.python_version(),
    jax=jax.__version__,
    jaxlib=importlib.metadata.version("jaxlib"),
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )


def one_line(error: Exception) -> str:
  """Returns `Type: message` on one line, at most 400 characters."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _time(compiled, problem, effort, ceilings):
  shape = problem.shape
  first = [()]
  if effort.takes_first(shape):
    first = [(jnp.int32(i),) for i in range(effort.layers(shape))]
    first = first[:: effort.steps]
  first = itertools.cycle(first)
  steps = effort.steps * effort.rounds(shape)

  def call():
    return compiled(problem.state, problem.query, *next(first))

  options = dict(
    steps=steps,
    repeats=effort.repeats,
    cool=ceilings.heats(shape.bytes, shape.flops),
  )
  model = timing.wall({"": call}, seconds=effort.seconds, **options)[""]
  row = dict(bytes=shape.bytes, flops=shape.flops,
             limit_us=ceilings.limit_us(shape.bytes, shape.flops))
  kernel = kernel_times(call, **options)
  return timed(model, row) | kernel


def timed(model: timing.Timing, row: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a row that follow from its model time."""
  return dataclasses.asdict(model) | rates(model.median_us, row)


def kernel_times(
  call: Callable[[], object], **options: Any
) -> dict[str, Any]:
  """Returns the sum of a call's kernels and each of them; {} off a GPU.

  options: those of `timing.kernels`.
  """
  measured = timing.kernels(call, **options)
  if measured is None:
    return {}
  kernel, names = measured
  return dict(
    kernel_us=kernel.median_us,
    kernel_iqr_us=kernel.iqr_us,
    kernels=[[n[:80], *rest] for n, rest in list(names.items())[:8]],
  )


def plain(row: dict[str, Any]) -> dict[str, Any]:
  """Returns a row fit for JSON: no NumPy scalars, None for NaN."""

  def one(value):
    if isinstance(value, np.generic):
      value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
      return None
    return value

  return {name: one(value) for name, value in row.items()}
