"""The source of a sweep's tensors, by the name its config gives."""

from experiments.common import grid as grid_lib
from experiments.common import problem


def make(grid: grid_lib.Grid) -> problem.Source:
  """Returns the source that `grid.source` names."""
  return problem.RandomSource(grid.seed)
