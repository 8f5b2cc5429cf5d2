"""The GPU dialects of Pallas, and what differs between jax versions.

The one place that names pallas.triton and pallas.mosaic_gpu: kernels call what
is here, so that a change in jax, or the end of a dialect, costs these files.

    triton     the Triton dialect
    mosaic     the Mosaic dialect itself
    launch     calls in it, and what orders kernels, warps and copies
    layouts    of shared memory
    products   on the tensor cores
    rows       in and out of their layout
    strided    rows in the layout of plain loads
    signals    from one CTA to another
"""

from jax.experimental.pallas import mosaic_gpu as mosaic

from paged_jax.ops.backend.launch import (
  copy_if,
  counter,
  draw,
  each_warp,
  hidden,
  meet,
  mosaic_call,
  prefetch_if,
  set_max_registers,
  split_barriers,
  start_next_kernel,
  wait_for_previous_kernel,
  wait_if,
)
from paged_jax.ops.backend.layouts import blocked, in_registers, tiled
from paged_jax.ops.backend.products import (
  compute_now,
  finish_matmul_add,
  matmul,
  matmul_add,
  rescale,
  start_matmul_add,
)
from paged_jax.ops.backend.rows import (
  across,
  load_blocks,
  mask_columns,
  packed,
  row_numbers,
  store_block,
  store_rows,
  unpacked,
  zero_dead_rows,
)
from paged_jax.ops.backend.signals import count, flags, raise_flag, take_flags
from paged_jax.ops.backend.strided import (
  full_numbers,
  full_strided,
  load_numbers,
  store_numbers,
  store_span,
  strided,
  strided_numbers,
  widen,
)
from paged_jax.ops.backend.triton import (
  compute_capability,
  dot,
  exp2,
  load,
  store,
  triton_call,
)

__all__ = [
  "across", "blocked", "compute_capability", "compute_now", "copy_if", "count",
  "counter", "dot", "draw", "each_warp", "exp2", "finish_matmul_add", "flags",
  "full_numbers", "full_strided", "hidden", "in_registers", "load",
  "load_blocks", "load_numbers", "mask_columns", "matmul", "matmul_add", "meet",
  "mosaic", "mosaic_call", "packed", "prefetch_if", "raise_flag", "rescale",
  "row_numbers", "set_max_registers", "split_barriers", "start_matmul_add",
  "start_next_kernel", "store", "store_block", "store_numbers", "store_rows",
  "store_span", "strided", "strided_numbers", "take_flags", "tiled",
  "triton_call", "unpacked", "wait_for_previous_kernel", "wait_if", "widen",
  "zero_dead_rows",
]
