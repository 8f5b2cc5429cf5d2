"""Products on Hopper's tensor cores, and the arithmetic between them.

Mosaic's own ones are right and wait for themselves; these overlap with others.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm, nvvm
import numpy as np

from paged_jax.ops.backend import layouts, rows


def matmul(
  a: Any,
  b: Any,
  shape: tuple[int, int],
  interpret: bool,
  meanwhile: Callable[[], None] = lambda: None,
  rest: Any = None,
) -> Any:
  """Returns a @ b.T in float32, [64, n]; a [64, k] and b [n, k] in SMEM.

  a is `tiled` or, with three axes, `blocked`; or in registers, and then `rest`
  may be further columns of it, `blocked` in SMEM.
  `meanwhile` is called when the product has been issued, before its end.
  """
  if interpret:
    parts = [x[...] if _is_ref(x) else x for x in (a, rest) if x is not None]
    parts = [
      x.swapaxes(0, 1).reshape(shape[0], -1) if x.ndim == 3 else x
      for x in parts
    ]
    product = _simulated_dot(jnp.concatenate(parts, axis=1), b[...].T)
    meanwhile()
    return product
  operand = mosaic.RefType(layouts.tiled(b.shape[1], b.dtype))
  of_blocks = mosaic.RefType(operand.transforms[1:])
  left = operand
  if not _is_ref(a):
    left = mosaic.Layout.WGMMA
  elif a.ndim == 3:
    left = of_blocks
  swizzle = operand.transforms[1].swizzle
  product_type = mosaic.ShapeDtypeStruct(
    shape, jnp.float32, layout=mosaic.Layout.WGMMA
  )

  b_itemsize = jnp.dtype(b.dtype).itemsize
  further = () if rest is None else (rest,)

  @mosaic.inline_mgpu(
    arg_types=(left, operand, *[of_blocks] * len(further)),
    return_type=product_type,
  )
  def issue(ctx, a, b, *further):
    del ctx
    zeros = mgpu.FragmentedArray.splat(
      arith.constant(ir.F32Type.get(), 0.0), shape, mgpu.WGMMA_LAYOUT
    )
    acc = mgpu.WGMMAAccumulator.from_registers(zeros, sync=False)
    nvvm.wgmma_fence_aligned()
    if left is of_blocks:
      a = layouts.row_tiles(a)
    b = mgpu.memref_transpose(b, (1, 0, 3, 2))  # blocks of columns first
    first = b
    if further:
      blocks = a.shape[1] * b_itemsize // swizzle
      first = mgpu.memref_slice(b, slice(0, blocks))
    before = len(ir.InsertionPoint.current.block.operations)
    acc = mgpu.wgmma(acc, a, first, swizzle=swizzle)
    _overwrite_accumulator(before)
    for x in further:
      others = mgpu.memref_slice(b, slice(blocks, None))
      acc = mgpu.wgmma(acc, layouts.row_tiles(x), others, swizzle=swizzle)
    nvvm.wgmma_commit_group_sync_aligned()
    return acc.value

  product = issue(a, b, *further)
  meanwhile()
  return _wait(product)


def matmul_add(acc: Any, a: Any, b: Any, interpret: bool) -> Any:
  """Returns acc + a @ b in float32; a in registers, b [k, n] in SMEM."""
  return finish_matmul_add(start_matmul_add(acc, a, b, interpret), interpret)


def start_matmul_add(acc: Any, a: Any, b: Any, interpret: bool) -> Any:
  """Issues acc + a @ b; acc [64, n] and a [64, k] in registers, b in SMEM.

  Of the result further ones may be started, nothing else be done with it before
  `finish_matmul_add`; until then b must stay as it is.
  """
  if interpret:
    return acc + _simulated_dot(a, b[...])
  operand = mosaic.RefType(layouts.tiled(b.shape[1], b.dtype))
  swizzle = operand.transforms[1].swizzle
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layout, layout, operand),
    return_type=mosaic.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout),
  )
  def issue(ctx, acc, a, b):
    del ctx
    a = mgpu.optimization_barrier(a)
    # None for acc, whose registers an earlier product may be writing.
    acc = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
    nvvm.wgmma_fence_aligned()
    acc = mgpu.wgmma(acc, a, b, swizzle=swizzle)
    nvvm.wgmma_commit_group_sync_aligned()
    return acc.value

  return issue(acc, a, b)


def finish_matmul_add(acc: Any, interpret: bool) -> Any:
  """Waits for what was started; returns the result."""
  return acc if interpret else _wait(acc)


def _wait(product):
  """Waits for all products that were issued, of which `product` is the last."""
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layout,),
    return_type=mosaic.ShapeDtypeStruct(
      product.shape, jnp.float32, layout=layout
    ),
  )
  def wait(ctx, product):
    del ctx
    nvvm.wgmma_wait_group_sync_aligned(0)
    return mgpu.optimization_barrier(product)

  return wait(product)


def rescale(acc: Any, factors: Any, interpret: bool) -> Any:
  """Returns acc [64, n] times factors; warps skip it where all are 1.

  factors: [64]; or [32], of rows 0 .. 7 of every 16: others may be anything.
  """
  across = rows.across(factors, acc.shape[1])
  if interpret:
    if factors.shape[0] == 32:
      across = rows.unpacked(across, interpret)
    return acc * across
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layout, layouts.in_registers(factors.shape[0])),
    return_type=mosaic.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layout),
  )
  def multiply(ctx, acc, factors):
    del ctx
    some = None
    for factor in set(factors.registers.flat):  # a thread has a few rows
      factor = vector.extract(factor, [], [0])
      one = arith.constant(factor.type, 1.0)
      changes = arith.cmpf(arith.CmpFPredicate.UNE, factor, one)
      some = changes if some is None else arith.ori(some, changes)
    step = acc.registers.size // factors.registers.size
    old = list(acc.registers.flat)
    changed = old[::step]
    types = [x.type for x in changed]
    branch = scf.IfOp(_any_lane(some), types, has_else=True)
    with ir.InsertionPoint(branch.then_block):
      scf.yield_([
        arith.mulf(x, y) for x, y in zip(changed, factors.registers.flat)
      ])
    with ir.InsertionPoint(branch.else_block):
      scf.yield_(changed)
    old[::step] = list(branch.results)
    registers = np.array(old, dtype=object)
    return mgpu.FragmentedArray(
      _registers=registers.reshape(acc.registers.shape),
      _layout=acc.layout,
      _is_signed=acc.is_signed,
    )

  return multiply(acc, across)


def compute_now(weights: Any, interpret: bool) -> None:
  """Has non-negative half-precision `weights` [64, n] computed at this point.

  ptxas moves arithmetic down over waits to where its result is needed. A branch
  on the sign bits, which is never taken, keeps it here.
  """
  if interpret:
    return

  @mosaic.inline_mgpu(arg_types=(mosaic.Layout.WGMMA,))
  def compute(ctx, weights):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    pairs = [
      vector.extract(vector.bitcast(ir.VectorType.get((1,), i32), x), [], [0])
      for x in weights.registers.flat
    ]
    signs = arith.andi(
      functools.reduce(arith.ori, pairs), arith.constant(i32, -0x7FFF8000)
    )
    zero = arith.constant(i32, 0)
    some = arith.cmpi(arith.CmpIPredicate.ne, signs, zero)
    with mgpu.when(_any_lane(some)):
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [], "nanosleep.u32 1;", "",
        has_side_effects=True,
      )

  compute(weights)


def _any_lane(condition: Any) -> Any:
  """Whether it holds in any thread of the warp.

  A branch on that is taken by a warp as a whole. With one that may divide it,
  ptxas gives up on uniform registers all over the loop around it.
  """
  every = arith.constant(ir.IntegerType.get_signless(32), -1)
  return nvvm.vote_sync(every, condition, "any")


def _is_ref(x: Any) -> bool:
  return not isinstance(x, jax.Array)


def _overwrite_accumulator(before: int) -> None:
  """Makes a product that was just emitted overwrite its accumulator.

  Mosaic's always add, to registers that are set to 0 while the tensor cores
  wait: 66 instructions an attention tile. Where the text of the instruction is
  not the known one it stays as it is, and right.

  before: number of operations in the current block when it began.
  """
  operations = list(ir.InsertionPoint.current.block.operations)
  for op in operations[max(before - 1, 0) :]:  # the last may be a terminator
    if op.name != "llvm.inline_asm":
      continue
    text = ir.StringAttr(op.attributes["asm_string"]).value
    if "wgmma.mma_async" not in text:
      continue
    add, overwrite = "setp.ne.b32 p, ", "setp.eq.b32 p, "
    if add in text:
      op.attributes["asm_string"] = ir.StringAttr.get(
        text.replace(add, overwrite)
      )
      with ir.InsertionPoint(op):  # the old values are not read
        for i, x in enumerate(op.operands):
          if isinstance(x.type, ir.VectorType):
            op.operands[i] = llvm.mlir_undef(x.type)
    return


def _simulated_dot(a, b):
  """Stands for WGMMA, of which the interpreter knows only a part."""
  # WGMMA reads by the async proxy, which orders it before later copies; these
  # were ordinary reads, which the race detector wants fenced.
  mosaic.commit_smem()
  return jnp.dot(
    a.astype(jnp.float32),
    b.astype(jnp.float32),
    precision=lax.Precision.HIGHEST,
  )
