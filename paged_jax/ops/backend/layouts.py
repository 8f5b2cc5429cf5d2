"""Layouts of shared memory that the tensor cores read."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mosaic
import jax.numpy as jnp


def tiled(columns: int, dtype: Any) -> tuple[Any, ...]:
  """Layout of SMEM that TMA writes and WGMMA reads: 8-row tiles, swizzled."""
  row_bytes = columns * jnp.dtype(dtype).itemsize
  swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
  tile = (8, swizzle // jnp.dtype(dtype).itemsize)
  return (mosaic.TilingTransform(tile), mosaic.SwizzleTransform(swizzle))


def blocked(columns: int, dtype: Any) -> tuple[int, int, tuple[Any, ...]]:
  """Layout of SMEM as blocks of whole rows, [columns // width, rows, width].

  WGMMA reads it as it does `tiled`, but a copy may begin at any row.

  Returns:
    The number of blocks, their width and the transforms.
  """
  tiling, swizzling = tiled(columns, dtype)
  width = tiling.tiling[1]
  return columns // width, width, (swizzling,)


def row_tiles(ref: Any) -> Any:
  """Views blocks, [n, rows, width], as tiles of 8 rows, [rows / 8, n, 8, w]."""
  return mgpu.memref_transpose(
    mgpu.memref_unfold(ref, 1, (None, 8)), (1, 0, 2, 3)
  )
