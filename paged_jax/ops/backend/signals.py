"""Flags and counts in global memory, by which CTAs learn of each other.

A flag says what another one has written. Nobody clears them first: memory that
a kernel is given holds what was there before. So a raised flag is a number of
64 bits that nothing else is, and who waits for a flag lowers it, so that none
stands when a kernel ends. A count may begin anywhere: its differences matter.
(One that has to begin at 0 is `launch.counter`.)
"""

from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm

from paged_jax.ops.backend import launch

_RAISED = 0x9E1B_53C7_60AF_D284  # any number, that no data happen to be
_HALVES = _RAISED & 0xFFFF_FFFF, _RAISED >> 32


def flags(count: int) -> jax.ShapeDtypeStruct:
  """Returns what an output of `count` flags looks like."""
  return jax.ShapeDtypeStruct((count, 2), jnp.uint32)


def raise_flag(ref: Any, i: Any, interpret: bool) -> None:
  """Raises flag i: all that this warpgroup has written is there to be read."""
  if interpret:
    for half, bits in enumerate(_HALVES):
      ref[i, half] = jnp.uint32(bits)
    return
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), scalar))
  def set_flag(ctx, ref, i):
    del ctx
    mgpu_utils.warpgroup_barrier()
    i32 = ir.IntegerType.get_signless(32)
    zero = arith.constant(i32, 0)
    first = arith.cmpi(arith.CmpIPredicate.eq, _thread(), zero)
    with mgpu.when(first):
      # What the barrier has ordered before this is released with it.
      place = _address(ref, i.registers.item())
      _asm("st.release.gpu.global.u64 [$0], $1;", place)

  set_flag(ref, i)


def take_flags(
  ref: Any, first: Any, count: Any, most: int, interpret: bool
) -> Any:
  """Waits until flags first .. first + count - 1 are raised, and lowers them.

  Each is waited for by one warpgroup of all CTAs, which may read afterwards
  what was written before it was raised. CTAs start in the order of their
  numbers, so it has to be one of a lower number that raises it, or else all
  have to fit on the device at once.

  Args:
    ref: `flags`.
    first: int32 scalar.
    count: int32 scalar.
    most: a bound of `count`.
    interpret: whether this is simulated; CTAs then run one after the other.

  Returns:
    Whether they were raised; natively always so.
  """
  if interpret:

    def take(i, there):
      for half, bits in enumerate(_HALVES):
        there &= ref[first + i, half] == jnp.uint32(bits)
        ref[first + i, half] = jnp.uint32(0)
      return there

    return lax.fori_loop(0, count, take, jnp.array(True))
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), scalar, scalar))
  def wait(ctx, ref, first, count):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    thread = _thread()
    for start in range(0, most, 128):
      i = arith.addi(thread, arith.constant(i32, start))
      with mgpu.when(
        arith.cmpi(arith.CmpIPredicate.slt, i, count.registers.item())
      ):
        place = _address(ref, arith.addi(i, first.registers.item()))
        _asm(
          "{ .reg .pred p; .reg .b64 found;"
          " again: ld.acquire.gpu.global.b64 found, [$0];"
          " setp.ne.b64 p, found, $1;"
          " @p bra again;"
          " st.relaxed.gpu.global.b64 [$0], 0; }",
          place,
        )
    mgpu_utils.warpgroup_barrier()

  wait(ref, first, count)
  return jnp.array(True)


def count(ref: Any, now: Any, raises: Any, before: Any) -> Any:
  """Raises a number in global memory by 1, and returns what it is about now.

  For a warp.

  Args:
    ref: int32 [1], whatever it holds at first.
    now: whether to look at it; `before` is returned otherwise.
    raises: whether this is one of those that raise it, when they look.
    before: int32 scalar.
  """
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(), scalar, scalar, scalar),
    return_type=mosaic.ShapeDtypeStruct((), jnp.int32, layout=scalar),
  )
  def look(ctx, ref, now, raises, before):
    del ctx
    number = llvm.inline_asm(
      ir.IntegerType.get_signless(32),
      [
        mgpu_utils.memref_ptr(ref),
        *(x.registers.item() for x in (now, raises, before)),
      ],
      "{ .reg .pred now, one, raises;"
      " mov.b32 $0, $4;"
      " setp.ne.s32 now, $2, 0;"
      " setp.ne.and.s32 raises, $3, 0, now;"
      " elect.sync _|one, -1;"
      " and.pred raises, raises, one;"
      " @raises red.relaxed.gpu.global.add.u32 [$1], 1;"
      " @now ld.relaxed.gpu.global.u32 $0, [$1]; }",
      "=&r,l,r,r,r",
      has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)

  now, raises = (jnp.asarray(x).astype(jnp.int32) for x in (now, raises))
  return look(ref, now, raises, before)


def _thread():
  i32 = ir.IntegerType.get_signless(32)
  thread = launch.fresh(mgpu.thread_idx())
  return arith.remui(thread, arith.constant(i32, 128))


def _address(ref, i):
  """Pointer to flag i, an int32 value."""
  index = ir.IndexType.get()
  i = arith.index_cast(index, i)
  zero = arith.constant(index, 0)
  return mgpu_utils.memref_ptr(mgpu.memref_slice(ref, (i, zero)))


def _asm(text, address):
  i64 = ir.IntegerType.get_signless(64)
  signed = _RAISED - (1 << 64)
  llvm.inline_asm(
    None, [address, arith.constant(i64, signed)], text, "l,l,~{memory}",
    has_side_effects=True,
  )
