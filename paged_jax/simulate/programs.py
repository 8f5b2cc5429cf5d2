"""One task as one call: fetch the pages of its blocks, run its stage kernel.

The kernels see tiles; this is where a block becomes a page: task (b, j) reads
pages page_table[b, j : j + g] of the pool. Page ids, sequence and live tokens
are traced, so a graph compiles once for each distinct number of blocks a task.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate import inputs as inputs_lib


class Programs:
  """The tasks of one graph over one set of inputs, ready to be called.

  Args:
    graph: made for the lengths and the block of inputs.
    inputs: of one case.
    stages: module of the stage kernels.
  """

  def __init__(
    self,
    graph: graph_lib.Graph,
    inputs: inputs_lib.Inputs,
    stages: types.ModuleType,
  ):
    heads, head_dim = inputs.query.shape[1:]
    self._graph = graph
    self._query = jnp.asarray(inputs.query)
    self._k_pages = jnp.asarray(inputs.k_pages)
    self._v_pages = jnp.asarray(inputs.v_pages)
    self._empty = (
      jnp.full((heads, 1), -jnp.inf),
      jnp.zeros((heads, 1)),
      jnp.zeros((heads, head_dim)),
    )
    self._kind = graph.kind.tolist()
    self._last = (graph.successor < 0).tolist()
    self._sequence = graph.sequence
    self._live = np.minimum(
      inputs.lengths[graph.sequence] - graph.first * inputs.block,
      graph.blocks * inputs.block,
    ).astype(np.int32)
    self._pages = [
      inputs.page_table[row, first : first + count]
      for row, first, count in zip(
        graph.sequence.tolist(), graph.first.tolist(), graph.blocks.tolist()
      )
    ]

    self._qk, self._softmax, self._pv, self._update = _kernels(
      stages, head_dim**-0.5, inputs.query.dtype
    )

  def run(self, task: int, left: Any, right: Any) -> Any:
    """Runs one task and waits for its result.

    Args:
      task: id.
      left: value of its first predecessor, None for none.
      right: value of its second predecessor, None for none.

    Returns:
      QK: logits. SOFTMAX: (P, m, l). Others: a state (m, l, acc), for PV that
      of its blocks alone.
    """
    kind = self._kind[task]
    if kind == graph_lib.Kind.QK:
      value = self._qk(
        self._query, self._k_pages, self._sequence[task], self._pages[task]
      )
      return value.block_until_ready()
    if kind == graph_lib.Kind.SOFTMAX:
      value = self._softmax(left, self._live[task])
    elif kind == graph_lib.Kind.PV:
      p, m, l = left
      o = self._pv(p, self._v_pages, self._pages[task], self._live[task])
      value = m, l, o
    elif right is None:
      value = self._update(self._empty, left, last=self._last[task])
    else:
      value = self._update(left, right, last=self._last[task])
    # The results of one call are there together.
    value[-1].block_until_ready()
    return value

  def warm_up(self) -> None:
    """Runs, and so compiles, every distinct call of the graph."""
    is_qk = self._graph.kind == graph_lib.Kind.QK
    for blocks in np.unique(self._graph.blocks[is_qk]):
      task = int(np.argmax(is_qk & (self._graph.blocks == blocks)))
      # The stages of a block are neighbours.
      value = None
      for stage in range(3):
        value = self.run(task + stage, value, None)
      for last in (False, True):
        state = self._update(self._empty, value, last=last)
        self._update(state, value, last=last)[-1].block_until_ready()


@functools.cache
def _kernels(stages: types.ModuleType, scale: float, dtype: np.dtype):
  """The four jitted calls; cached, so that equal shapes compile once."""

  @jax.jit
  def qk(query, k_pages, sequence, pages):
    return stages.qk_matmul(query[sequence], k_pages[pages])

  @jax.jit
  def softmax(logits, live):
    return stages.softmax_prepare(logits, live, scale=scale, dtype=dtype)

  @jax.jit
  def pv(probabilities, v_pages, pages, live):
    return stages.pv_matmul(probabilities, v_pages[pages], live)

  @functools.partial(jax.jit, static_argnames="last")
  def update(state, new, *, last):
    return stages.online_update(state, new, last=last)

  return qk, softmax, pv, update
