"""Rows in the layout of plain loads, spread over a warpgroup.

Some rows of equal width, flat: [rows * width], neighbouring threads with
neighbouring columns, up to four each. Of what is one number a row a thread has
one for these: [rows * width / 4], or so.
"""

from collections.abc import Iterator
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
import jax.numpy as jnp
import numpy as np

from paged_jax.ops.backend import launch


def strided(size: int) -> Any:
  """Returns the layout of rows, [size], a multiple of 128."""
  return mosaic.Layout.WG_STRIDED((size,), vec_size=_columns(size))


def strided_numbers(size: int) -> Any:
  """Returns the layout of numbers that rows, [size], have one of each."""
  return mosaic.Layout.WG_STRIDED((size // _columns(size),), vec_size=1)


def full_strided(size: int, value: float, dtype: Any = jnp.float32) -> Any:
  """Returns rows, [size], of the same value everywhere."""
  x = jnp.full((size,), value, dtype)
  return mosaic.layout_cast(x, strided(size))


def full_numbers(size: int, value: float) -> Any:
  """Returns the same number, float32, for each of rows, [size]."""
  x = jnp.full((size // _columns(size),), value, jnp.float32)
  return mosaic.layout_cast(x, strided_numbers(size))


def widen(numbers: Any, size: int, interpret: bool) -> Any:
  """Returns each row's number in all of its columns, [size]."""
  if numbers.shape[0] == size:
    return numbers
  if interpret:
    return jnp.repeat(numbers, _columns(size))
  layout = strided(size)

  @mosaic.inline_mgpu(
    arg_types=(strided_numbers(size),),
    return_type=mosaic.ShapeDtypeStruct((size,), numbers.dtype, layout=layout),
  )
  def repeat(ctx, numbers):
    del ctx
    kind = ir.VectorType.get((_columns(size),), numbers.mlir_dtype)
    registers = [
      vector.broadcast(kind, vector.extract(x, [], [0]))
      for x in numbers.registers
    ]
    return _array(registers, layout)

  return repeat(numbers)


def load_numbers(
  ref: Any, place: tuple[Any, ...], first: Any, rows: int, width: int,
  interpret: bool,
) -> Any:
  """Returns one number a row, ref[*place, first + row].

  Rows outside of `ref` get what its first or last one has.
  """
  last, size = ref.shape[-1] - 1, rows * width
  if interpret:
    numbers = [
      ref[(*place, jnp.clip(first + row, 0, last))] for row in range(rows)
    ]
    return jnp.repeat(jnp.stack(numbers), width // _columns(size))
  layout, scalar = strided_numbers(size), mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(), scalar, *[scalar] * len(place)),
    return_type=mosaic.ShapeDtypeStruct(
      (size // _columns(size),), ref.dtype, layout=layout
    ),
  )
  def load(ctx, ref, first, *place):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    kind = ir.VectorType.get((1,), ref.type.element_type)
    registers = []
    for row, _ in _places(size, width):
      at = arith.addi(first.registers.item(), row)
      at = arith.maxsi(at, arith.constant(i32, 0))
      at = arith.minsi(at, arith.constant(i32, last))
      number = memref.load(ref, _indices(*place, at))
      registers.append(vector.broadcast(kind, number))
    return _array(registers, layout)

  return load(ref, first, *place)


def store_span(
  ref: Any, place: Any, first: Any, value: Any, begin: Any, end: Any,
  width: int, interpret: bool,
) -> None:
  """Stores rows begin .. end - 1 of those of `value`.

  Args:
    ref: [R, C] in global memory.
    place: int32 scalar, row of `ref`.
    first: int32 scalar, where the first row of `value` would go.
    value: [rows * width], `strided`.
    begin: int32 scalar.
    end: int32 scalar.
    width: columns of a row.
    interpret: whether this is simulated.
  """
  size = value.shape[0]
  if interpret:
    for row in range(size // width):

      @pl.when((begin <= row) & (row < end))
      def _(row=row):
        part = value[row * width : (row + 1) * width]
        ref[place, pl.ds(first + row * width, width)] = part

    return

  def store(ref, register, place, first, row, column):
    i32 = ir.IntegerType.get_signless(32)
    at = arith.addi(arith.muli(row, arith.constant(i32, width)), column)
    vector.store(register, ref, _indices(place, arith.addi(first, at)))

  _store(store, ref, place, first, value, begin, end, width, size, strided)


def store_numbers(
  ref: Any, place: Any, first: Any, value: Any, begin: Any, end: Any,
  rows: int, width: int, interpret: bool,
) -> None:
  """Stores numbers of rows begin .. end - 1, ref[place, first + row].

  Args:
    ref: [R, C] in global memory.
    place: int32 scalar, row of `ref`.
    first: int32 scalar, where the first row's number would go.
    value: `strided_numbers` of `rows` rows.
    begin: int32 scalar.
    end: int32 scalar.
    rows: how many there are.
    width: columns of a row.
    interpret: whether this is simulated.
  """
  size = rows * width
  if interpret:
    for row in range(rows):

      @pl.when((begin <= row) & (row < end))
      def _(row=row):
        ref[place, first + row] = value[row * (value.shape[0] // rows)]

    return

  def store(ref, register, place, first, row, column):
    zero = arith.constant(ir.IntegerType.get_signless(32), 0)
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, column, zero)):
      number = vector.extract(register, [], [0])
      memref.store(number, ref, _indices(place, arith.addi(first, row)))

  _store(
    store, ref, place, first, value, begin, end, width, size, strided_numbers
  )


def _store(
  store, ref, place, first, value, begin, end, width, size, layout_of
):
  """Calls `store` for each register of rows begin .. end - 1."""
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(), *[scalar] * 4, layout_of(size))
  )
  def each(ctx, ref, place, first, begin, end, value):
    del ctx
    place, first, begin, end = (
      x.registers.item() for x in (place, first, begin, end)
    )
    for register, (row, column) in zip(
      value.registers, _places(size, width), strict=True
    ):
      wanted = arith.andi(
        arith.cmpi(arith.CmpIPredicate.sge, row, begin),
        arith.cmpi(arith.CmpIPredicate.slt, row, end),
      )
      with mgpu.when(wanted):
        store(ref, register, place, first, row, column)

  each(ref, place, first, begin, end, value)


def _columns(size: int) -> int:
  """Neighbouring columns that a thread holds of rows, [size]."""
  return 4 if size % 512 == 0 else 2 if size % 256 == 0 else 1


def _places(size: int, width: int) -> Iterator[tuple[ir.Value, ir.Value]]:
  """Row and first column of each register of this thread, int32."""
  i32 = ir.IntegerType.get_signless(32)
  by = arith.constant(i32, width)
  thread = launch.fresh(mgpu.thread_idx())
  thread = arith.remui(thread, arith.constant(i32, 128))
  own = arith.muli(thread, arith.constant(i32, _columns(size)))
  for start in range(0, size, 128 * _columns(size)):
    at = arith.addi(own, arith.constant(i32, start))
    yield arith.divui(at, by), arith.remui(at, by)


def _array(registers, layout):
  return mgpu.FragmentedArray(
    _registers=np.array(registers, object), _layout=layout.to_mgpu(),
    _is_signed=None,
  )


def _indices(*places):
  """As indices of memory; places: int32 values, or arrays of no dimensions."""
  index = ir.IndexType.get()
  return [
    arith.index_cast(
      index, x.registers.item() if isinstance(x, mgpu.FragmentedArray) else x
    )
    for x in places
  ]
