"""`hopper`: paged attention for sm_90 by Pallas Mosaic GPU.

Up to 8 query tokens a sequence, decode: `paged_decode` (hopper_decode.py). What
each CTA does is planned on the device, once a step (hopper_plan.py), in shapes
that hopper_tuning.py chooses.

More, prefill: `paged_prefill` (hopper_prefill.py) walks a list of query tiles
(hopper_prefill_plan.py); decode rows among them are tiles too, narrow ones
where the batch is mixed.

A plan with `shared_prefix`: both, the prefill kernel for the pages that all
rows begin with (hopper_shared.py). One with `memory_order`: decode, its pages
in another order (hopper_order.py).

What no tile fits is left to `triton`.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from paged_jax.ops import (
  hopper_decode,
  hopper_order,
  hopper_plan,
  hopper_prefill,
  hopper_prefill_plan,
  hopper_shared,
  hopper_tuning,
  triton,
)
from paged_jax.ops.inputs import Inputs
from paged_jax.ops.plan import Geometry

_INTERPRETED_CTAS = 3  # enough to split segments; the interpreter is slow
_FEW_QUERIES = 8  # what the decode kernel takes

Work = hopper_plan.Work | hopper_prefill_plan.Work | hopper_shared.Work


def attend(
  inputs: Inputs, *, plan: Work | None, interpret: bool
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token.

  Raises:
    NotImplementedError: this version of jax, device or call is not supported.
  """
  sms = _num_sms(interpret)
  geometry = Geometry(
    num_heads=inputs.num_heads,
    num_kv_heads=inputs.num_kv_heads,
    head_dim=inputs.head_dim,
    page_size=inputs.page_size,
    dtype=str(inputs.query.dtype),
    max_query_length=inputs.max_query_length,
    causal=inputs.causal,
    window=inputs.window,
    combined=inputs.combined,
  )
  if not (inputs.num_tokens and inputs.num_sequences):
    raise NotImplementedError("no query tokens, or no sequences")
  if plan is None:
    try:
      plan = _make_work(
        inputs.lengths,
        None if inputs.decode else inputs.query_starts,
        geometry,
        inputs.max_pages,
        sms,
        num_tokens=inputs.num_tokens,
      )
    except hopper_tuning.TooFewRows:
      # A page of fewer than 8 rows cannot be copied, and more than 64 query
      # rows of a kv head of H > 128 overflow the decode kernel's registers.
      return triton.attend(inputs, interpret=interpret)
  return _attend(inputs, plan, sms, interpret)


# Jitted, so that layers of one shape are traced and lowered once (a second a
# kernel), however often a model calls it.
@functools.partial(jax.jit, static_argnums=(2, 3), inline=False)
def _attend(inputs, plan, sms, interpret):
  if isinstance(plan, hopper_shared.Work):
    return hopper_shared.attend(
      inputs,
      plan,
      lambda own, work: _attend(own, work, sms, interpret),
      num_ctas=sms,
      interpret=interpret,
    )
  if isinstance(plan, hopper_prefill_plan.Work):
    return hopper_prefill.attend(
      inputs, plan, num_ctas=sms, interpret=interpret
    )

  if plan.tables:
    inputs = dataclasses.replace(
      inputs, k_table=plan.tables[0], v_table=plan.tables[-1]
    )

  # One call at a time: CTAs of a kernel wait for each other, so that all should
  # fit on the device at once, which those of a whole batch would not.
  @jax.custom_batching.sequential_vmap
  def decode(inputs, plan):
    return hopper_decode.attend(inputs, plan, interpret=interpret)

  return decode(inputs, plan)


def make_plan(
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None,
  geometry: Geometry,
  *,
  num_tokens: int | None = None,
  batch_invariant: bool = False,
  shared_prefix: bool = False,
  memory_order: bool = False,
  least_shared: int = hopper_shared.LEAST_TOKENS,
  overrides: Mapping[str, Any] | None = None,
) -> Work | None:
  """Returns what all layers of a step share; None if there is nothing.

  num_tokens: T, which bounds the tiles of a prefill step and tells that a batch
    is mixed; None: unknown.
  shared_prefix: whether pages that all rows begin with are to be read once.
  memory_order: whether decode may read a row's pages in order of their ids.
  least_shared: tokens; a shorter prefix counts as none.
  overrides: fields of hopper_tuning.Config in place of the table's, to tune.

  Raises:
    NotImplementedError: `attend` would refuse these calls.
  """
  sms = _num_sms(interpret=None)

  def make_work(lengths):
    return _make_work(
      lengths,
      query_starts,
      geometry,
      page_table.shape[-1],
      sms,
      num_tokens=num_tokens,
      batch_invariant=batch_invariant,
      overrides=overrides,
    )

  try:
    if not shared_prefix:
      work = make_work(lengths)
      if memory_order and isinstance(work, hopper_plan.Work):
        tables = hopper_order.in_memory_order(
          page_table, lengths, query_starts, geometry
        )
        work = dataclasses.replace(work, tables=tables)
      return work
    return hopper_shared.make_work(
      page_table,
      lengths,
      query_starts,
      geometry,
      make_work,
      num_ctas=sms,
      num_tokens=num_tokens,
      least_tokens=least_shared,
    )
  except hopper_tuning.TooFewRows:
    if batch_invariant or shared_prefix:
      raise
    return None  # `attend` takes another kernel


def _make_work(
  lengths,
  query_starts,
  geometry,
  max_pages,
  sms,
  *,
  num_tokens,
  batch_invariant=False,
  overrides=None,
):
  """The plan of the kernel that takes a step of this geometry."""
  if geometry.max_query_length > _FEW_QUERIES:
    # Tiles walk their own positions, and narrow ones what others would.
    config = hopper_prefill_plan.choose(
      geometry,
      lengths.shape[0],
      num_tokens,
      batch_invariant=batch_invariant,
      **(overrides or {}),
    )
    return hopper_prefill_plan.make_work(
      lengths, query_starts, geometry, config, num_tokens
    )
  B = lengths.shape[0]
  config = hopper_tuning.choose(
    geometry,
    B,
    max_pages,
    decode=query_starts is None,
    batch_invariant=batch_invariant,
    overrides=overrides,
  )
  return hopper_plan.make_work(
    lengths,
    query_starts,
    geometry,
    config,
    hopper_tuning.num_ctas(config, B, sms),
    max_pages,
  )


def _num_sms(interpret: bool | None) -> int:
  """Multiprocessors of the device that the call is lowered for.

  interpret None: unknown (a plan), so anything but a wrong GPU will do.
  """
  if jax.__version_info__ < (0, 11):
    raise NotImplementedError(f"jax {jax.__version__}: hopper needs 0.11")
  kind, sms = _device()
  if interpret or (interpret is None and kind is None):
    return _INTERPRETED_CTAS
  if kind is None or not any(x in kind for x in ("H100", "H200", "GH200")):
    raise NotImplementedError(f"device {kind}: hopper needs an sm_90 GPU")
  return sms


def _device() -> tuple[str | None, int]:
  """Kind and multiprocessors of the GPU in use, abstract or real."""
  abstract: Any = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    if abstract.platform not in (None, "gpu", "cuda"):
      return None, 0
    return abstract.device_kind, abstract.num_cores
  device = jax.devices()[0]
  if device.platform not in ("gpu", "cuda"):
    return None, 0
  return device.device_kind, device.core_count
