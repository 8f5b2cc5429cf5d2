"""The GPU dialects of Pallas, and what differs between jax versions.

The one file that names pallas.triton and pallas.mosaic_gpu: kernels call what
is here, so that a change in jax, or the end of a dialect, costs one file.

Triton half: `triton_call` launches a kernel, `load` and `store` are its masked
accesses, `dot` its matrix product.

Mosaic half: `mosaic` is the dialect, `mosaic_call` launches a kernel,
`matmul` and `matmul_add` are its tensor-core products, `copy_if` its copy; the
rest is what those leave to the compiler and it does not do well.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from types import MappingProxyType
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.experimental.pallas import triton as plt
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm, nvvm
import numpy as np

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


# --- Mosaic -----------------------------------------------------------------


def mosaic_call(
  kernel: Callable[..., None],
  *,
  name: str,
  grid: tuple[int, ...],
  grid_names: tuple[str, ...],
  out_shape: Sequence[jax.ShapeDtypeStruct],
  scratch: Sequence[Any],
  num_warpgroups: int,
  interpret: bool,
) -> Callable[..., Sequence[jax.Array]]:
  """Returns `plgpu.kernel` of a kernel whose threads are warpgroups.

  Args:
    kernel: takes one ref an input, one an output, then one a scratch.
    name: name of the kernel in profiles.
    grid: CTAs.
    grid_names: names of the grid's axes; the warpgroup axis is "wg".
    out_shape: shapes and dtypes of the outputs.
    scratch: shared memory and barriers.
    num_warpgroups: warpgroups of 128 threads a CTA.
    interpret: whether to simulate it on CPU, barriers and races included.
  """

  def named(*refs):
    kernel(*refs)

  named.__name__ = name
  simulate = {}
  if interpret:
    simulate["interpret"] = mosaic.InterpretGPUParams(detect_races=True)
  return mosaic.kernel(
    named,
    out_type=tuple(out_shape),
    grid=grid,
    grid_names=grid_names,
    num_threads=num_warpgroups,
    thread_name="wg",
    scratch_types=tuple(scratch),
    compiler_params=mosaic.CompilerParams(
      approx_math=True,
      # The default differs between versions.
      lowering_semantics=mosaic.LoweringSemantics.Lane,
    ),
    **simulate,
  )


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


def matmul(
  a: Any,
  b: Any,
  shape: tuple[int, int],
  interpret: bool,
  meanwhile: Callable[[], None] = lambda: None,
) -> Any:
  """Returns a @ b.T in float32, [64, n]; a [64, k] and b [n, k] in SMEM.

  a is `tiled` or, with three axes, `blocked`; or in registers.

  `meanwhile` is called when the product has been issued, before its end.
  """
  if interpret:
    rows = a[...] if _is_ref(a) else a
    if rows.ndim == 3:
      rows = rows.swapaxes(0, 1).reshape(shape[0], -1)
    product = _simulated_dot(rows, b[...].T)
    meanwhile()
    return product
  operand = mosaic.RefType(tiled(b.shape[1], b.dtype))
  left = operand
  if not _is_ref(a):
    left = mosaic.Layout.WGMMA
  elif a.ndim == 3:
    left = mosaic.RefType(operand.transforms[1:])
  product_type = mosaic.ShapeDtypeStruct(
    shape, jnp.float32, layout=mosaic.Layout.WGMMA
  )

  @mosaic.inline_mgpu(
    arg_types=(left, operand), return_type=product_type
  )
  def issue(ctx, a, b):
    del ctx
    zeros = mgpu.FragmentedArray.splat(
      arith.constant(ir.F32Type.get(), 0.0), shape, mgpu.WGMMA_LAYOUT
    )
    acc = mgpu.WGMMAAccumulator.from_registers(zeros, sync=False)
    nvvm.wgmma_fence_aligned()
    if not isinstance(left, mosaic.Layout) and left is not operand:
      a = _row_tiles(a)
    b = mgpu.memref_transpose(b, (1, 0, 3, 2))
    before = len(ir.InsertionPoint.current.block.operations)
    acc = mgpu.wgmma(acc, a, b, swizzle=operand.transforms[1].swizzle)
    _overwrite_accumulator(before)
    nvvm.wgmma_commit_group_sync_aligned()
    return acc.value

  @mosaic.inline_mgpu(
    arg_types=(mosaic.Layout.WGMMA,), return_type=product_type
  )
  def wait(ctx, product):
    del ctx
    nvvm.wgmma_wait_group_sync_aligned(0)
    return mgpu.optimization_barrier(product)

  product = issue(a, b)
  meanwhile()
  return wait(product)


def _is_ref(x: Any) -> bool:
  return not isinstance(x, jax.Array)


def _row_tiles(ref: Any) -> Any:
  """Views blocks, [n, rows, width], as tiles of 8 rows, [rows / 8, n, 8, w]."""
  return mgpu.memref_transpose(
    mgpu.memref_unfold(ref, 1, (None, 8)), (1, 0, 2, 3)
  )


def load_blocks(ref: Any, wanted: Any, interpret: bool) -> Any:
  """Returns `blocked` rows, [64, columns], in WGMMA's layout.

  They may be copied over once all threads are past this. Where they are not
  `wanted` they may be anything, and what is returned is not to be used.
  """
  blocks, rows, width = ref.shape
  if interpret:  # reading while others write is an error
    values = lax.cond(
      wanted, lambda: ref[...], lambda: jnp.zeros(ref.shape, ref.dtype)
    )
    mosaic.commit_smem()
    return values.swapaxes(0, 1).reshape(rows, blocks * width)
  *_, transforms = blocked(width, ref.dtype)

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(transforms),),
    return_type=mosaic.ShapeDtypeStruct(
      (rows, blocks * width), ref.dtype, layout=mosaic.Layout.WGMMA
    ),
  )
  def load(ctx, ref):
    del ctx
    return mgpu.FragmentedArray.load_tiled(
      _row_tiles(ref), transforms[0].swizzle, layout=mgpu.WGMMA_LAYOUT
    )

  values = load(ref)
  mosaic.commit_smem()
  return values


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


def matmul_add(
  acc: Any,
  a: Any,
  b: Any,
  interpret: bool,
  meanwhile: Callable[[], None] = lambda: None,
) -> Any:
  """Returns acc + a @ b in float32; a in registers, b [k, n] in SMEM."""
  if interpret:
    product = _simulated_dot(a, b[...])
    meanwhile()
    return acc + product

  def compute(acc_ref):
    mosaic.wgmma(acc_ref, a, b)
    meanwhile()

  return pl.run_state(compute)(mosaic.ACC.init(acc))


def each_warp(body: Callable[..., None], interpret: bool) -> None:
  """Calls body(warps=[w]) on each warp w of a warpgroup by itself.

  Simulated, one caller does the work of all: body(warps=[0, 1, 2, 3]).
  """
  if interpret:
    body(warps=list(range(4)))
  else:
    mosaic.warp_map(lambda warp: body(warps=[warp]))


def rescale(acc: Any, factors: Any, interpret: bool) -> Any:
  """Returns acc [64, n] times factors [64], skipped where those are 1."""
  across = lax.broadcast_in_dim(factors, acc.shape, [0])
  if interpret:
    return acc * across
  layout = mosaic.Layout.WGMMA

  @mosaic.inline_mgpu(
    arg_types=(layout, layout),
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
    types = [x.type for x in acc.registers.flat]
    branch = scf.IfOp(some, types, has_else=True)
    with ir.InsertionPoint(branch.then_block):
      product = acc * factors
      scf.yield_(list(product.registers.flat))
    with ir.InsertionPoint(branch.else_block):
      scf.yield_(list(acc.registers.flat))
    registers = np.array(list(branch.results), dtype=object)
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
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.ne, signs, zero)):
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [], "nanosleep.u32 1;", "",
        has_side_effects=True,
      )

  compute(weights)


def set_max_registers(count: int, action: str, interpret: bool) -> None:
  """Moves registers between warpgroups; some compilers ignore it."""
  if not interpret:
    mosaic.set_max_registers(count, action=action)


def store_rows(
  ref: Any, value: Any, rows: Any, columns: Any, interpret: bool
) -> None:
  """Stores rows of a WGMMA result into global memory, each to its own place.

  Args:
    ref: [R, C] in global memory.
    value: [64, n] in WGMMA's layout, or one number a row, [64].
    rows: int32 [64], target row; below 0: not stored.
    columns: int32 [64], target of the first column.
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
  layout = mosaic.Layout.WGMMA
  offsets = jnp.zeros_like(columns)
  if value.ndim == 2:
    rows, columns = (
      lax.broadcast_in_dim(x, value.shape, [0]) for x in (rows, columns)
    )
    offsets = mosaic.broadcasted_iota(
      jnp.int32, value.shape, 1, layout=layout
    )
  else:
    layout = layout.reduce(1)
  indices = [mosaic.layout_cast(x, layout) for x in (rows, columns, offsets)]

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), *[layout] * 4))
  def store(ctx, ref, value, rows, columns, offsets):
    del ctx
    index = ir.IndexType.get()
    zero = arith.constant(ir.IntegerType.get_signless(32), 0)

    def first(register):  # of the neighbouring columns a register holds
      if not isinstance(register.type, ir.VectorType):
        return register
      return vector.extract(register, [], [0])

    by_row = {}  # a thread holds parts of a few rows
    for at in np.ndindex(value.registers.shape):
      by_row.setdefault(rows.registers[at], []).append(at)
    for row, places in by_row.items():
      row, base = first(row), first(columns.registers[places[0]])
      with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, row, zero)):
        for at in places:
          column = arith.addi(base, first(offsets.registers[at]))
          place = [arith.index_cast(index, x) for x in (row, column)]
          register = value.registers[at]
          if isinstance(register.type, ir.VectorType):
            vector.store(register, ref, place)
          else:
            memref.store(register, ref, place)

  store(ref, value, *indices)


def store_block(ref: Any, value: Any, interpret: bool) -> None:
  """Stores [64, width] in WGMMA's layout into a block of `blocked`."""
  if interpret:
    ref[...] = value
    return
  *_, transforms = blocked(ref.shape[1], ref.dtype)

  @mosaic.inline_mgpu(
    arg_types=(mosaic.RefType(transforms), mosaic.Layout.WGMMA)
  )
  def store(ctx, ref, value):
    del ctx
    rows = mgpu.memref_unfold(ref, 0, (None, 8))
    value.store_tiled(mgpu.memref_unsqueeze(rows, 1), transforms[0].swizzle)

  store(ref, value)


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
  transforms = tiled(columns, ref.dtype)
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
    _, thread = split(mgpu.thread_idx(), 128)
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


def counter() -> Any:
  """Returns a counter in global memory that all CTAs share, 0 at first."""
  return pl.get_global(mosaic.SemaphoreType.REGULAR)


def draw(counter: Any, target: Any, base: int) -> None:
  """Stores base + counter into `target`, SMEM [1], and raises the counter.

  For one warp; its later arrivals on barriers tell others of the number.
  """

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), mosaic.RefType()))
  def add(ctx, counter, target):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    zero = arith.constant(ir.IndexType.get(), 0)
    with mgpu.when(nvvm.elect_sync()):
      number = llvm.inline_asm(
        i32,
        [mgpu.utils.memref_ptr(counter)],
        "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;",
        "=r,l",
        has_side_effects=True,
      )
      number = arith.addi(number, arith.constant(i32, base))
      memref.store(number, target, [zero])
    nvvm.bar_warp_sync(arith.constant(i32, -1))

  add(counter, target)


def wait_if(condition: Any, barrier: Any) -> None:
  """Waits for the barrier's next phase where `condition` holds."""

  @pl.when(condition)
  def _():
    mosaic.barrier_wait(barrier)


def wait_for_previous_kernel(interpret: bool) -> None:
  """Blocks until what earlier kernels wrote is there; see the next."""
  if not interpret:
    mosaic.griddepcontrol_wait()


def start_next_kernel(interpret: bool) -> None:
  """Lets the next kernel be launched now, if it waits as above."""
  if not interpret:
    mosaic.griddepcontrol_launch_dependents()


def copy_if(
  live: Any, source: Any, target: Any, barrier: Any, interpret: bool
) -> None:
  """Copies to shared memory if `live`; arrives on `barrier` in any case."""
  if not interpret:
    mosaic.copy_gmem_to_smem(source, target, barrier, predicate=live)
    return

  # The interpreter has no predicate.
  @pl.when(live)
  def _():
    mosaic.copy_gmem_to_smem(source, target, barrier)

  @pl.when(jnp.logical_not(live))
  def _():
    mosaic.barrier_arrive(barrier)


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
