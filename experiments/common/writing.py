"""Write shapes: new rows of K and V go to their slots, layer after layer.

A program writes the same tokens into every layer of one donated 5-D pool, as
the layers of a model do, and hands the pool on to the next call. What is right
is looked up the other way round: each slot asks which token it should hold.

The new rows are read from L2, as in a model that has just computed them, and
some megabytes of written ones stay there too: up to 2048 tokens or so a writer
may be faster than the copy ceiling.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from experiments.common import ceilings as ceilings_lib
from experiments.common import cells, shapes, timing
from experiments.common import problem as problem_lib
from paged_jax.ops import write_kv


def run(
  group: Sequence[cells.Cell],
  effort: cells.Effort,
  ceilings: ceilings_lib.Ceilings,
  seed: int,
) -> list[dict[str, Any]]:
  """Verifies and times writers on one shape.

  Args:
    group: cells of the shape; their implementations are `write_kv`'s.
    effort: how much work goes into a row.
    ceilings: of this run; the copy is the limit here.
    seed: of data and page order.

  Returns:
    A row for every cell.
  """
  shape = group[0].shape
  effort = dataclasses.replace(effort, cold_bytes=2**62)  # as many as may be
  layers = effort.layers(shape)
  where = jnp.asarray(new_slots(shape, seed))
  size = (shape.num_tokens, shape.num_kv_heads, shape.head_dim)
  keys = jax.random.split(jax.random.key(seed))
  k, v = (jax.random.normal(key, size, shape.dtype) for key in keys)
  rows, writers = [], {}
  for cell in group:
    row = cells.describe(cell, ceilings)
    row |= dict(
      steps=layers,
      layers=layers,
      bound_by="copy",
      limit_us=shape.bytes / (ceilings.copy_gbps * 1e3),
    )
    rows.append(row)
    name = cell.implementation
    try:
      if name not in write_kv.IMPLEMENTATIONS:
        raise NotImplementedError(f"{name} writes nothing")
      writer = _Writer(shape, layers, name, (k, v, where))
      wrong = writer.wrong()
      row.update(status="ok", error="", checked_tokens=shape.num_tokens)
      if wrong:
        row.update(status="wrong", error=f"{wrong} elements of the pools")
      elif not cell.interpret:
        writers[name] = writer
    except NotImplementedError as error:
      row.update(status="unsupported", error=cells.one_line(error))
    except Exception as error:
      row.update(status="failed", error=cells.one_line(error))
  model = timing.wall(
    writers, steps=layers, repeats=effort.repeats, seconds=effort.seconds
  )
  effort = dataclasses.replace(effort, steps=layers)
  for row in rows:
    name = row["implementation"]
    if name in writers:
      row |= cells.timed(model[name], row)
      row |= cells.kernel_times(
        writers[name], steps=effort.steps, repeats=effort.repeats
      )
  return rows


def new_slots(shape: shapes.Shape, seed: int) -> Int[np.ndarray, "T"]:
  """Returns the slots of the new tokens: the last ones of every row."""
  every = problem_lib.slots(shape, problem_lib.page_table(shape, seed))
  ends = shape.lengths.cumsum()
  return np.concatenate([
    every[end - new : end] for end, new in zip(ends, shape.query_lengths)
  ]).astype(np.int32)


class _Writer:
  """Pools and the program that writes to them; calling it is one step."""

  def __init__(self, shape, layers, implementation, args):
    self._args = args
    spec = problem_lib.specs(shape, layers)["k_pages"]
    # Dead slots are NaN, so that a token that went astray shows.
    self._pools = tuple(
      jnp.full(spec.shape, jnp.nan, spec.dtype) for _ in range(2)
    )

    def step(k_pages, v_pages, k, v, slots):
      for layer in range(layers):
        k_pages, v_pages = write_kv.write_kv(
          k_pages, v_pages, k, v, slots, layer=jnp.int32(layer),
          implementation=implementation,
        )
      # An element that the next call will not take away: it can be waited for.
      return k_pages, v_pages, k_pages[0, 0, 0, 0, 0]

    self._step = (
      jax.jit(step, donate_argnums=(0, 1)).lower(*self._pools, *args).compile()
    )

  def __call__(self):
    *self._pools, done = self._step(*self._pools, *self._args)
    return done

  def wrong(self) -> int:
    """Returns how many elements are wrong after a step."""
    k, v, slots = self._args
    self()
    pools = self._pools
    token = np.full(pools[0].shape[1] * pools[0].shape[3], -1, np.int32)
    token[np.asarray(slots)] = np.arange(len(slots))
    return sum(
      int(_wrong(pool, rows, jnp.asarray(token)))
      for pool, rows in zip(pools, (k, v))
    )


@jax.jit
def _wrong(
  pool: Float[Array, "L P K p H"],
  rows: Float[Array, "T K H"],
  token: Int[Array, "P*p"],
) -> Int[Array, ""]:
  """Counts elements that differ from their slot's token, or from NaN."""
  _, P, _, p, _ = pool.shape
  token = token.reshape(P, p)
  want = rows[token].swapaxes(1, 2)  # [P, K, p, H]
  live = (token >= 0)[:, None, :, None]

  def layer(pages):
    return jnp.where(live, pages != want, ~jnp.isnan(pages)).sum()

  return jax.lax.map(layer, pool).sum()
