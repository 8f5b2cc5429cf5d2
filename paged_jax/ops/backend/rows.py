"""Moving rows in the layout of the tensor cores' results."""

import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm
import numpy as np

from paged_jax.ops.backend import launch, layouts


def across(x: Any, columns: int) -> Any:
  """Returns one number a row, [rows], in all of its columns."""
  (rows,) = x.shape
  x = lax.broadcast_in_dim(x, (rows, columns), [0])
  if rows == 32:  # Pallas finds the layout of 64 only
    x = mosaic.layout_cast(x, layouts.in_registers(rows))
  return x


def packed(x: Any, interpret: bool) -> Any:
  """Returns rows 0 .. 7 of every 16 of a product [64, n]: [32, n]."""
  shape = 32, x.shape[1]
  if interpret:
    return x.reshape(4, 2, 8, -1)[:, 0].reshape(shape)
  layout = layouts.in_registers(32)

  @mosaic.inline_mgpu(
    arg_types=(mosaic.Layout.WGMMA,),
    return_type=mosaic.ShapeDtypeStruct(shape, x.dtype, layout=layout),
  )
  def pack(ctx, x):
    del ctx
    # [1, n / 8, 1, 1, 2 groups of 8 rows, ..]: one register each.
    registers = x.registers.reshape(-1, 2)[:, 0]
    layout_ = layout.to_mgpu()
    return mgpu.FragmentedArray(
      _registers=registers.reshape(layout_.registers_shape(shape)),
      _layout=layout_,
      _is_signed=x.is_signed,
    )

  return pack(x)


def unpacked(x: Any, interpret: bool) -> Any:
  """Returns [64, n] with x, [32, n], in rows 0 .. 7 of every 16, else 0."""
  shape = 64, x.shape[1]
  if interpret:
    x = x.reshape(4, 1, 8, -1)
    return jnp.concatenate([x, jnp.zeros_like(x)], axis=1).reshape(shape)
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layouts.in_registers(32),),
    return_type=mosaic.ShapeDtypeStruct(shape, x.dtype, layout=layout),
  )
  def unpack(ctx, x):
    del ctx
    layout_ = layout.to_mgpu()
    registers = np.empty((x.registers.size, 2), dtype=object)
    registers[:, 0] = x.registers.flat
    registers[:, 1] = llvm.mlir_zero(x.registers.flat[0].type)
    return mgpu.FragmentedArray(
      _registers=registers.reshape(layout_.registers_shape(shape)),
      _layout=layout_,
      _is_signed=x.is_signed,
    )

  return unpack(x)


def load_blocks(ref: Any, wanted: Any, interpret: bool) -> Any:
  """Returns `blocked` rows, [64, columns], in WGMMA's layout.

  They may be copied over once all threads have arrived on a barrier. Where they
  are not `wanted` they may be anything, and what is returned is not to be used.
  """
  blocks, rows, width = ref.shape
  if interpret:  # reading while others write is an error
    values = lax.cond(
      wanted, lambda: ref[...], lambda: jnp.zeros(ref.shape, ref.dtype)
    )
    mosaic.commit_smem()
    return values.swapaxes(0, 1).reshape(rows, blocks * width)
  *_, transforms = layouts.blocked(width, ref.dtype)

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(transforms),),
    return_type=mosaic.ShapeDtypeStruct(
      (rows, blocks * width), ref.dtype, layout=mosaic.Layout.WGMMA
    ),
  )
  def load(ctx, ref):
    del ctx
    with launch.fresh_threads():
      return mgpu.FragmentedArray.load_tiled(
        layouts.row_tiles(ref), transforms[0].swizzle, layout=mgpu.WGMMA_LAYOUT
      )

  return load(ref)


def store_block(ref: Any, value: Any, interpret: bool) -> None:
  """Stores [64, width] in WGMMA's layout into a block of `blocked`."""
  if interpret:
    ref[...] = value
    return
  *_, transforms = layouts.blocked(ref.shape[1], ref.dtype)

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(transforms), mosaic.Layout.WGMMA)
  )
  def store(ctx, ref, value):
    del ctx
    rows = mgpu.memref_unfold(ref, 0, (None, 8))
    with launch.fresh_threads():
      value.store_tiled(mgpu.memref_unsqueeze(rows, 1), transforms[0].swizzle)

  store(ref, value)


def row_numbers(interpret: bool) -> Any:
  """Returns 0 .. 63, one number a row of WGMMA's layout, int32 [64].

  Each call makes them anew, so that they are not held in registers.
  """
  layout = mosaic.Layout.WGMMA.reduce(1)
  if interpret:
    return mosaic.broadcasted_iota(jnp.int32, (64,), 0, layout=layout)

  @mosaic.inline_mgpu(
    return_type=mosaic.ShapeDtypeStruct((64,), jnp.int32, layout=layout)
  )
  def make(ctx):
    del ctx
    with launch.fresh_threads():
      return mgpu.FragmentedArray.broadcasted_iota(
        ir.IntegerType.get_signless(32), (64,), 0, layout.to_mgpu(),
        is_signed=True,
      )

  return make()


def store_rows(
  ref: Any, value: Any, rows: Any, columns: Any, interpret: bool
) -> None:
  """Stores rows of a product into global memory, each to its own place.

  Args:
    ref: [R, C] in global memory.
    value: [m, n] of a product, m 64 or 32, or one number a row, [m].
    rows: int32 [m], target row; below 0: not stored.
    columns: int32 [m], target of the first column.
  """
  if interpret:
    width = value.shape[1:]

    def one(i, _):
      row, column = rows[i], columns[i]

      @pl.when(row >= 0)
      def _():
        if width:
          ref[row, pl.ds(column, width[0])] = value[i]
        else:
          ref[row, column] = value[i]

      return 0

    lax.fori_loop(0, value.shape[0], one, 0)
    return
  layout = layouts.in_registers(value.shape[0])
  if value.ndim == 2:
    rows, columns = (across(x, value.shape[1]) for x in (rows, columns))
  else:
    layout = layout.reduce(1)
  indices = [mosaic.layout_cast(x, layout) for x in (rows, columns)]

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), *[layout] * 3))
  def store(ctx, ref, value, rows, columns):
    del ctx
    index = ir.IndexType.get()
    i32 = ir.IntegerType.get_signless(32)
    zero = arith.constant(i32, 0)
    # Before any branch: it takes all lanes of a warp.
    own = _own_column() if len(value.shape) == 2 else zero

    def first(register):  # of the neighbouring columns a register holds
      if not isinstance(register.type, ir.VectorType):
        return register
      return vector.extract(register, [], [0])

    by_row = {}  # a thread holds parts of a few rows
    for at in np.ndindex(value.registers.shape):
      by_row.setdefault(rows.registers[at], []).append(at)
    for row, places in by_row.items():
      row, base = first(row), first(columns.registers[places[0]])
      base = arith.addi(base, own)
      with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, row, zero)):
        for at in places:
          number = arith.constant(i32, _first_column(value, at))
          column = arith.addi(base, number)
          place = [arith.index_cast(index, x) for x in (row, column)]
          register = value.registers[at]
          if isinstance(register.type, ir.VectorType):
            vector.store(register, ref, place)
          else:
            memref.store(register, ref, place)

  store(ref, value, *indices)


def mask_columns(value: Any, first: Any, last: Any, interpret: bool) -> Any:
  """Returns `value` with -inf in columns outside first .. last - 1.

  Columns are compared as constants with limits that each thread shifts, so that
  their numbers take no registers.

  Args:
    value: float32 [64, n] in WGMMA's layout.
    first: int32 [64], first column of each row to keep; None: 0.
    last: int32 [64], past the last one.
    interpret: whether this is simulated.
  """
  limits = [last] if first is None else [last, first]
  if interpret:
    at = lax.broadcasted_iota(jnp.int32, value.shape, 1)
    keep = at < last[:, None]
    if first is not None:
      keep &= at >= first[:, None]
    return jnp.where(keep, value, -jnp.inf)
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layout, *[layout] * len(limits)),
    return_type=mosaic.ShapeDtypeStruct(
      value.shape, value.dtype, layout=layout
    ),
  )
  def mask(ctx, value, *limits):
    del ctx
    Predicate = arith.CmpIPredicate
    i32 = ir.IntegerType.get_signless(32)
    fill = arith.constant(ir.F32Type.get(), -math.inf)
    own = _own_column()
    shifted = {}

    def limit(register):
      if register not in shifted:
        row = vector.extract(register, [], [0])  # the same in both columns
        shifted[register] = arith.subi(row, own)
      return shifted[register]

    registers = value.registers.copy()
    for at in np.ndindex(registers.shape):
      column = _first_column(value, at)
      for i in range(2):  # neighbouring columns that a register holds
        number = arith.constant(i32, column + i)
        keep = None
        for x, holds in zip(limits, (Predicate.sgt, Predicate.sle)):
          inside = arith.cmpi(holds, limit(x.registers[at]), number)
          keep = inside if keep is None else arith.andi(keep, inside)
        x = vector.extract(registers[at], [], [i])
        x = arith.select(keep, x, fill)
        registers[at] = vector.insert(x, registers[at], [], [i])
    return mgpu.FragmentedArray(
      _registers=registers, _layout=value.layout, _is_signed=None
    )

  across = [lax.broadcast_in_dim(x, value.shape, [0]) for x in limits]
  return mask(value, *across)


def zero_dead_rows(
  ref: Any,
  first: Any,
  last: Any,
  interpret: bool,
  *,
  heads: int = 1,
  step: int = 1,
) -> None:
  """Zeroes rows of `ref` outside positions first .. last - 1.

  Called by a whole warpgroup. It reads nothing and takes few registers.

  Args:
    ref: [n, k] in SMEM, `tiled`, n a multiple of 64. Rows are [n / (heads *
      step), heads, step]: `heads` ones of each position.
    first: int32 scalar, may be negative.
    last: int32 scalar, may be larger than n.
    interpret: whether this is simulated.
    heads: a power of two.
    step: a power of two; of no account if heads is 1.
  """
  rows, columns = ref.shape
  if interpret:
    at = lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    if heads > 1:
      at = at // (heads * step) * step + at % step
    values = ref[...]
    ref[...] = jnp.where(
      (at >= first) & (at < last), values, jnp.zeros_like(values)
    )
    mosaic.commit_smem()
    return
  transforms = layouts.tiled(columns, ref.dtype)
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(transforms), scalar, scalar))
  def zero(ctx, ref, first, last):
    del ctx
    # [rows of 8, tiles, 8, width]: a swizzle moves 16 bytes about in a row of a
    # tile, which is dead as a whole.
    _, tiles, _, width = ref.type.shape
    strides, _ = ref.type.get_strides_and_offset()
    assert list(strides) == [tiles * 8 * width, 8 * width, width, 1], strides
    width = transforms[1].swizzle  # bytes
    lanes = width // 16  # threads of a row
    i32 = ir.IntegerType.get_signless(32)
    byte = ir.IntegerType.get_signless(8)

    def split(x, by):  # quotient and remainder
      by = arith.constant(i32, by)
      return arith.divui(x, by), arith.remui(x, by)

    def times(x, by):
      return arith.muli(x, arith.constant(i32, by))

    def dead(i):
      at = arith.addi(row, arith.constant(i32, i))
      if heads > 1:
        at = arith.addi(
          times(split(at, heads * step)[0], step), split(at, step)[1]
        )
      return arith.ori(
        arith.cmpi(arith.CmpIPredicate.slt, at, first),
        arith.cmpi(arith.CmpIPredicate.sge, at, last),
      )

    first, last = (x.registers.item() for x in (first, last))
    _, thread = split(launch.fresh(mgpu.thread_idx()), 128)
    row, lane = split(thread, lanes)
    block, within = split(row, 8)
    offset = arith.addi(
      arith.addi(times(block, tiles * 8 * width), times(within, width)),
      times(lane, 16),
    )
    zeros = llvm.mlir_zero(ir.VectorType.get((4,), i32))
    start = mgpu_utils.memref_ptr(ref)
    dynamic = -(2**31)  # stands for an index that is no constant
    start = llvm.getelementptr(start.type, start, [offset], [dynamic], byte, 0)
    for i in range(0, rows, 128 // lanes):
      with mgpu.when(dead(i)):
        for j in range(tiles):
          at = (i * tiles + j * 8) * width
          llvm.store(
            zeros,
            llvm.getelementptr(start.type, start, [], [at], byte, 0),
            alignment=16,
          )

  zero(ref, first, last)
  mosaic.commit_smem()


def _own_column():
  """The first column that a thread holds of a WGMMA result, int32.

  Of all columns it holds neighbouring two in every eight.
  """
  two, four = (
    arith.constant(ir.IntegerType.get_signless(32), i) for i in (2, 4)
  )
  thread = launch.fresh(mgpu.thread_idx())
  return arith.muli(arith.remui(thread, four), two)


def _first_column(value, at):
  """The column of register `at` of a WGMMA result, less the thread's own."""
  if len(value.shape) == 1:
    return 0
  strides = value.layout.tiling.tile_strides((value.shape[1], 1))
  return sum(i * s for i, s in zip(at, strides)) % value.shape[1]
