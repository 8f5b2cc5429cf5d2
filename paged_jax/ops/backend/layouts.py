"""Layouts of shared memory that the tensor cores read."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as mosaic
import jax.numpy as jnp


def tiled(columns: int, dtype: Any) -> tuple[Any, ...]:
  """Layout of SMEM that TMA writes and WGMMA reads: 8-row tiles, swizzled."""
  row_bytes = columns * jnp.dtype(dtype).itemsize
  swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
  tile = (8, swizzle // jnp.dtype(dtype).itemsize)
  return (mosaic.TilingTransform(tile), mosaic.SwizzleTransform(swizzle))


def in_registers(rows: int) -> Any:
  """Layout of a product's rows, [rows, n], in a warpgroup's registers.

  64: that of WGMMA's results, of which a warp has 16 rows, and a thread parts
  of two, 8 apart. 32: the first 8 of each 16 only, half the registers:

      row of 32    0 .. 7    8 .. 15    16 .. 23    24 .. 31
      row of 64    0 .. 7   16 .. 23    32 .. 39    48 .. 55
      warp            0         1           2           3
  """
  if rows == 64:
    return mosaic.Layout.WGMMA
  assert rows == 32, rows
  return mosaic.Layout.TILED(
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
  )


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
