"""The arrays of one attention call: real tokens in a deliberately messy pool.

Page ids are a random permutation, the pool is smaller than B * M pages where
the lengths allow it, and every slot that holds no token is NaN, so that a
kernel which reads the wrong place cannot come out right by luck. The tokens
are put there by the page table's own slots and `write_kv`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from experiments.common import shapes
from paged_jax.ops import write_kv


class Source(Protocol):
  """Where queries, keys and values come from."""

  def query(self, shape: shapes.Shape) -> Float[Array, "T N H"]:
    """Returns the packed queries of layer 0."""

  def keys_values(
    self, shape: shapes.Shape, layer: int
  ) -> tuple[Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Returns the S = sum(lengths) tokens of a layer, row after row."""


@dataclasses.dataclass(frozen=True)
class RandomSource:
  """Standard-normal q, k and v: logits of unit variance at scale H**-0.5."""

  seed: int = 0

  def query(self, shape: shapes.Shape) -> Float[Array, "T N H"]:
    size = (shape.num_tokens, shape.num_heads, shape.head_dim)
    return _normal(jax.random.key(self.seed), size, shape.dtype)

  def keys_values(self, shape: shapes.Shape, layer: int):
    size = (shape.num_kv_tokens, shape.num_kv_heads, shape.head_dim)
    keys = jax.random.split(jax.random.key(self.seed + 1 + layer))
    return tuple(_normal(key, size, shape.dtype) for key in keys)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, size, dtype):
  # Drawn in float32: bfloat16's own draws know a few hundred values only.
  return jax.random.normal(key, size, jnp.float32).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Device arrays of a shape, L layers in one pool."""

  shape: shapes.Shape
  query: Float[Array, "T N H"]
  k_pages: Float[Array, "L P K p H"]
  v_pages: Float[Array, "L P K p H"]
  page_table: Int[Array, "B M"]  # null entry = P
  lengths: Int[Array, "B"]
  query_starts: Int[Array, "B+1"]
  sinks: Float[Array, "N"] | None
  k: Float[Array, "S K H"]  # layer 0's tokens, row after row
  v: Float[Array, "S K H"]

  @property
  def state(self) -> dict[str, Any]:
    """What `programs.ours` takes beside the query."""
    names = (
      "k_pages", "v_pages", "page_table", "lengths", "query_starts", "sinks"
    )
    return {name: getattr(self, name) for name in names}


def tokens(
  shape: shapes.Shape, source: Source, layer: int
) -> tuple[Float[Array, "S K H"], Float[Array, "S K H"]]:
  """Returns a layer's keys and values, row after row; prefixes agree."""
  k, v = source.keys_values(shape, layer)
  if not shape.shared_prefix:
    return k, v
  positions = np.concatenate([np.arange(n) for n in shape.lengths])
  own = np.arange(len(positions))
  index = jnp.asarray(np.where(positions < shape.shared_prefix, positions, own))
  return k[index], v[index]


def num_pages(shape: shapes.Shape) -> int:
  """P: the pages in use and an eighth more, at least three, all NaN."""
  shared = shape.shared_prefix // shape.page_size
  used = int(shape.pages.sum()) - (shape.batch - 1) * shared
  return used + max(3, used // 8)


def specs(shape: shapes.Shape, layers: int) -> dict[str, Any]:
  """Returns the shapes and dtypes of `Problem`'s arrays, to compile for."""
  B, N, K = shape.batch, shape.num_heads, shape.num_kv_heads
  H, dtype = shape.head_dim, shapes.numpy_dtype(shape.dtype)
  pool = (layers, num_pages(shape), K, shape.page_size, H)
  spec = jax.ShapeDtypeStruct
  rows = spec((shape.num_kv_tokens, K, H), dtype)
  return dict(
    query=spec((shape.num_tokens, N, H), dtype),
    k_pages=spec(pool, dtype),
    v_pages=spec(pool, dtype),
    page_table=spec((B, shape.max_pages), np.int32),
    lengths=spec((B,), np.int32),
    query_starts=spec((B + 1,), np.int32),
    sinks=spec((N,), np.float32) if shape.sinks else None,
    k=rows,
    v=rows,
  )


def page_table(shape: shapes.Shape, seed: int) -> Int[np.ndarray, "B M"]:
  """Returns a table of page ids drawn without order from the whole pool."""
  total = num_pages(shape)
  ids = np.random.default_rng(seed).permutation(total).astype(np.int32)
  table = np.full((shape.batch, shape.max_pages), total, np.int32)
  owned = np.arange(shape.max_pages) < shape.pages[:, None]
  shared = shape.shared_prefix // shape.page_size
  owned[1:, :shared] = False
  table[owned] = ids[: owned.sum()]
  table[1:, :shared] = table[0, :shared]
  return table


def slots(
  shape: shapes.Shape, table: Int[np.ndarray, "B M"]
) -> Int[np.ndarray, "S"]:
  """Returns the slot of every token, row after row."""
  p = shape.page_size
  positions = np.concatenate([np.arange(n) for n in shape.lengths])
  rows = np.repeat(np.arange(shape.batch), shape.lengths)
  return table[rows, positions // p] * p + positions % p


def build(
  shape: shapes.Shape,
  *,
  layers: int,
  source: Source,
  seed: int = 0,
  write: Callable[..., tuple[Array, Array]] | None = None,
) -> Problem:
  """Draws the tokens of `shape` and writes them to their slots.

  Args:
    shape: the call.
    layers: L, layers of the pool.
    source: of queries, keys and values.
    seed: of the page permutation and the sinks.
    write: `writer(shape, layers)` where the caller has it, compiled ahead.

  Returns:
    The problem, on the default device.
  """
  spec = specs(shape, layers)
  table = page_table(shape, seed)
  where = jnp.asarray(slots(shape, table))
  pools = [jnp.full(spec["k_pages"].shape, jnp.nan, shape.dtype)
           for _ in range(2)]
  first = None
  write = write or writer(shape, layers)
  for layer in range(layers):
    k, v = tokens(shape, source, layer)
    pools = write(*pools, k, v, where, np.int32(layer))
    first = first or (k, v)
  sinks = None
  if shape.sinks:
    rng = np.random.default_rng(seed)
    sinks = jnp.asarray(rng.standard_normal(shape.num_heads, np.float32))
  return Problem(
    shape=shape,
    query=source.query(shape),
    k_pages=pools[0],
    v_pages=pools[1],
    page_table=jnp.asarray(table),
    lengths=jnp.asarray(shape.lengths),
    query_starts=jnp.asarray(shape.query_starts),
    sinks=sinks,
    k=first[0],
    v=first[1],
  )


def writer(shape: shapes.Shape, layers: int) -> jax.stages.Compiled:
  """Compiles (k_pages, v_pages, k, v, slots, layer) -> the two pools."""
  spec = specs(shape, layers)
  where = jax.ShapeDtypeStruct((shape.num_kv_tokens,), np.int32)
  layer = jax.ShapeDtypeStruct((), np.int32)

  def write(k_pages, v_pages, k, v, where, layer):
    return write_kv.write_kv(k_pages, v_pages, k, v, where, layer=layer)

  pools = spec["k_pages"], spec["v_pages"]
  return (
    jax.jit(write, donate_argnums=(0, 1))
    .lower(*pools, spec["k"], spec["v"], where, layer)
    .compile()
  )
