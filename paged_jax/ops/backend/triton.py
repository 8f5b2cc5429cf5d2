"""The Triton dialect of Pallas: calls, masked accesses, products."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp


def triton_call(
  kernel: Callable[..., None],
  *,
  name: str,
  grid: tuple[int, ...],
  out_shape: Sequence[jax.ShapeDtypeStruct],
  num_warps: int,
  num_stages: int,
  interpret: bool,
  aliases: Mapping[int, int] = MappingProxyType({}),
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
    aliases: outputs by the input whose memory they take over, both by number.
  """
  return pl.pallas_call(
    kernel,
    name=name,
    grid=grid,
    out_shape=tuple(out_shape),
    input_output_aliases=dict(aliases),
    # Always explicit: jax picks the dialect by it, and by version without it.
    compiler_params=plt.CompilerParams(
      num_warps=num_warps, num_stages=num_stages
    ),
    interpret=interpret,
  )


def compute_capability() -> float:
  """Returns that of the GPU to compile for; 9.0 (H100) on a host without."""
  return float(getattr(jax.devices()[0], "compute_capability", 9.0))


def load(
  ref: Any, mask: jax.Array | None = None, other: float = 0
) -> jax.Array:
  """Loads `ref`, an indexed view; masked-out elements are `other`, unread."""
  if mask is None:
    return plt.load(ref)
  return plt.load(ref, mask=mask, other=jnp.array(other, ref.dtype))


def store(ref: Any, value: jax.Array, mask: jax.Array) -> None:
  """Stores `value` where `mask`.

  The interpreter writes old values back where masked out, so masked-out
  elements must not share an address with stored ones: send them out of bounds.
  """
  plt.store(ref, value.astype(ref.dtype), mask=mask)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
  """Returns 2**x in float32 by one instruction; denormal results are 0."""
  if interpret:
    return jnp.exp2(x)
  (out,) = plt.elementwise_inline_asm(
    "ex2.approx.ftz.f32 $0, $1;",
    args=[x],
    constraints="=f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
  )
  return out


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
  """Returns a @ b, or a @ b.T, in float32; float32 inputs never take TF32."""
  return lax.dot_general(
    a,
    b,
    (((1,), (1 if transpose_b else 0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
