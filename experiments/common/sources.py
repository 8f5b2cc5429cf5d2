"""The source of a sweep's tensors, by the name its config gives."""

from experiments.common import captured, problem
from experiments.common import grid as grid_lib


def make(grid: grid_lib.Grid, scale: grid_lib.Scale) -> problem.Source:
  """Returns the source that `grid.source` names, large enough for `scale`."""
  if grid.source == "random":
    return problem.RandomSource(grid.seed)
  return captured.smollm2(
    batch=max(scale.decode_batch, scale.prefill_batch),
    context=max(scale.decode_context, scale.prefill_context),
    text=grid.text,
  )
