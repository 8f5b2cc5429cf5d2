"""The GPU dialects of Pallas, and what differs between jax versions.

The one file that names pallas.triton and pallas.mosaic_gpu: kernels call what
is here, so that a change in jax, or the end of a dialect, costs one file.

Triton half: `triton_call` launches a kernel, `load` and `store` are its masked
accesses, `dot` its matrix product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

# --- Triton -----------------------------------------------------------------


def triton_call(
  kernel: Callable[..., None],
  *,
  name: str,
  grid: tuple[int, ...],
  out_shape: Sequence[jax.ShapeDtypeStruct],
  num_warps: int,
  num_stages: int,
  interpret: bool,
) -> Callable[..., Sequence[jax.Array]]:
  """Returns `pl.pallas_call` of a kernel that sees every array whole.

  Args:
    kernel: takes one ref an input, then one an output.
    name: name of the kernel in profiles.
    grid: programs; axis 0 is launched fastest.
    out_shape: shapes and dtypes of the outputs.
    num_warps: warps of 32 threads a program.
    num_stages: depth of the software pipeline that the compiler makes of loops.
    interpret: whether to run it as plain XLA operations, on any device.
  """
  return pl.pallas_call(
    kernel,
    name=name,
    grid=grid,
    out_shape=tuple(out_shape),
    # Always explicit: jax picks the dialect by it, and by version without it.
    compiler_params=plt.CompilerParams(
      num_warps=num_warps, num_stages=num_stages
    ),
    interpret=interpret,
  )


def load(ref: Any, mask: jax.Array) -> jax.Array:
  """Loads `ref`, an indexed view; masked-out elements are 0 and not read."""
  return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Any, value: jax.Array, mask: jax.Array) -> None:
  """Stores `value` where `mask`.

  The interpreter writes old values back where masked out, so masked-out
  elements must not share an address with stored ones: send them out of bounds.
  """
  plt.store(ref, value.astype(ref.dtype), mask=mask)


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
  """Returns a @ b, or a @ b.T, in float32; float32 inputs never take TF32."""
  return lax.dot_general(
    a,
    b,
    (((1,), (1 if transpose_b else 0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
