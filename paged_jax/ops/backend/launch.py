"""The Mosaic dialect of Pallas: calls, and what orders kernels and warps."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref
import jax.numpy as jnp
from jaxlib.mlir.dialects import llvm, nvvm

# Cache policies of PTX, as `createpolicy` makes them for whole lines. Source:
# CUTLASS, cute::TMA::CacheHintSm90.
_EVICT_NORMAL = 0x1000000000000000
_EVICT_FIRST = 0x12F0000000000000


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
      # Rows are reduced within a warp, as WGMMA lays them out.
      reduction_scratch_bytes=0,
      # The default differs between versions.
      lowering_semantics=mosaic.LoweringSemantics.Lane,
    ),
    **simulate,
  )


def each_warp(body: Callable[..., None], interpret: bool) -> None:
  """Calls body(warps=[w]) on each warp w of a warpgroup by itself.

  Simulated, one caller does the work of all: body(warps=[0, 1, 2, 3]).
  """
  if interpret:
    body(warps=list(range(4)))
  else:
    mosaic.warp_map(lambda warp: body(warps=[warp]))


def split_barriers(barriers: Any, *counts: int) -> list["_Part"]:
  """Splits an array of barriers with equally many arrivals.

  One array takes fewer registers than many: an address, and the phases.
  """
  if barriers.shape != (sum(counts),):
    raise ValueError(f"{barriers.shape} barriers for {counts}")
  ends = itertools.accumulate(counts)
  return [
    _Part(barriers, end - count)
    for count, end in zip(counts, ends, strict=True)
  ]


def hidden(i: Any, interpret: bool) -> Any:
  """Returns the int32 scalar i, as a number that compilers do not know.

  As an index of barriers it keeps the address of one, which is known when the
  kernel begins, from being held in a register until it is used.
  """
  if interpret:
    return i
  scalar = mosaic.Layout.WG_SPLAT(())

  @mosaic.inline_mgpu(
    arg_types=(scalar,),
    return_type=mosaic.ShapeDtypeStruct((), jnp.int32, layout=scalar),
  )
  def hide(ctx, i):
    del ctx
    i = fresh(i.registers.item())
    return mgpu.FragmentedArray.splat(i, (), is_signed=True)

  return hide(i)


def fresh(x: ir.Value) -> ir.Value:
  """Returns an int32, as another one to compilers, who keep no copy of it.

  For whole warps: all lanes must come here.
  """
  zero, lanes, every = (arith.constant(x.type, i) for i in (0, 31, -1))
  return nvvm.shfl_sync(every, x, zero, lanes, nvvm.ShflKind.bfly)


@contextlib.contextmanager
def fresh_threads() -> Iterator[None]:
  """Makes threads' numbers `fresh` in what is emitted meanwhile.

  Mosaic's loads and stores take no number as an argument, and addresses that
  depend on it alone would be computed when the kernel begins, and then held.
  """
  block = ir.InsertionPoint.current.block
  before = len(block.operations)
  yield
  i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
  new = None
  # From one before on, for a block may end in a terminator; what is in regions
  # of its operations stays as it is.
  for op in list(block.operations)[max(before - 1, 0) :]:
    if op.name != "gpu.thread_id" or "x" not in str(op.attributes["dimension"]):
      continue  # of one axis only: the others have length 1
    if new is not None:
      op.result.replace_all_uses_with(new)
      continue
    with ir.InsertionPoint.after(op):
      old = arith.index_cast(i32, op.result)
      new = arith.index_cast(index, fresh(old))
    op.result.replace_all_uses_except(new, old.owner.operation)


class _Part:
  """Some barriers of an array: `part.at[i]`."""

  def __init__(self, barriers, first):
    self._barriers, self._first = barriers, first

  @property
  def at(self):
    return self

  def __getitem__(self, i):
    return self._barriers.at[self._first + i]


def set_max_registers(count: int, action: str, interpret: bool) -> None:
  """Moves registers between warpgroups; some compilers ignore it."""
  if not interpret:
    mosaic.set_max_registers(count, action=action)


def wait_if(condition: Any, barrier: Any) -> None:
  """Waits for the barrier's next phase where `condition` holds."""

  @pl.when(condition)
  def _():
    mosaic.barrier_wait(barrier)


def meet(barrier: Any) -> None:
  """Returns when all warpgroups that a barrier counts have called it."""
  mosaic.barrier_arrive(barrier)
  mosaic.barrier_wait(barrier)


def wait_for_previous_kernel(interpret: bool) -> None:
  """Blocks until what earlier kernels wrote is there; see the next."""
  if not interpret:
    mosaic.griddepcontrol_wait()


def start_next_kernel(interpret: bool) -> None:
  """Lets the next kernel be launched now, if it waits as above.

  In a CUDA graph, as XLA makes them, it is launched when this one has ended.
  """
  if not interpret:
    mosaic.griddepcontrol_launch_dependents()


def copy_if(
  live: Any,
  source: Any,
  target: Any,
  barrier: Any,
  interpret: bool,
  once: Any = None,
) -> None:
  """Copies to shared memory if `live`; arrives on `barrier` in any case.

  once: whether this is the only copy of `source`, which may then leave L2
    before others; None: unknown.
  """
  if not interpret:
    mosaic.copy_gmem_to_smem(source, target, barrier, predicate=live)
    if once is not None:
      _evict_first(once.astype(jnp.int32))
    return

  # The interpreter has no predicate.
  @pl.when(live)
  def _():
    mosaic.copy_gmem_to_smem(source, target, barrier)

  @pl.when(jnp.logical_not(live))
  def _():
    mosaic.barrier_arrive(barrier)


def prefetch_if(live: Any, source: Any, interpret: bool) -> None:
  """Asks L2 for what a copy will bring, if `live`; a hint, which may be early.

  What an earlier kernel still writes there is seen all the same, for it writes
  to L2; and what lies outside of the array is not asked for.
  """
  if not interpret:
    mosaic.async_prefetch(source, predicate=live)


def _evict_first(condition: Any) -> None:
  """Gives the copy that was just emitted a hint to L2, if `condition` != 0.

  Pallas has no argument for it, so the operation is replaced. Where it is not
  found, as with jax 0.12, the copy stays as it is, and right.
  """

  @mosaic.inline_mgpu(arg_types=(mosaic.Layout.WG_SPLAT(()),))
  def edit(ctx, condition):
    del ctx
    condition = condition.registers.item()
    for op in reversed(list(ir.InsertionPoint.current.block.operations)):
      if op.name != "nvvm.cp.async.bulk.tensor.shared.cluster.global":
        continue
      i64 = ir.IntegerType.get_signless(64)
      zero = arith.constant(condition.type, 0)
      hint = arith.select(
        arith.cmpi(arith.CmpIPredicate.ne, condition, zero),
        arith.constant(i64, _EVICT_FIRST),
        arith.constant(i64, _EVICT_NORMAL),
      )
      nvvm.cp_async_bulk_tensor_shared_cluster_global(
        op.dstMem,
        op.tmaDescriptor,
        list(op.coordinates),
        op.mbar,
        [],
        l2_cache_hint=hint,
        predicate=op.predicate,
      )
      op.operation.erase()
      return

  edit(condition)


def counter() -> Any:
  """Returns a counter in global memory that all CTAs share, 0 at first."""
  return pl.get_global(mosaic.SemaphoreType.REGULAR)


def draw(counter: Any, target: Any, base: int) -> None:
  """Stores base + counter into `target`, SMEM [1], and raises the counter.

  For one warp, all of which may read it afterwards.
  """

  @mosaic.inline_mgpu(arg_types=(mosaic.RefType(), mosaic.RefType()))
  def add(ctx, counter, target):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    zero = arith.constant(ir.IndexType.get(), 0)
    with mgpu.when(nvvm.elect_sync()):
      number = llvm.inline_asm(
        i32,
        [mgpu_utils.memref_ptr(counter)],
        "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;",
        "=r,l",
        has_side_effects=True,
      )
      number = arith.addi(number, arith.constant(i32, base))
      memref.store(number, target, [zero])
    nvvm.bar_warp_sync(arith.constant(i32, -1))

  add(counter, target)
