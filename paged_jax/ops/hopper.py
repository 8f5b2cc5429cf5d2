"""`hopper`: paged decode for sm_90 by Pallas Mosaic GPU.

Two kernels: `paged_decode` (hopper_decode.py) computes partial results in equal
shares, `paged_decode_merge` (hopper_merge.py) puts them together. What each CTA
does is planned on the device, once a step (hopper_plan.py), in shapes that
hopper_tuning.py chooses. What no tile fits is left to `triton`.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from paged_jax.ops import (
  hopper_decode,
  hopper_merge,
  hopper_plan,
  hopper_tuning,
  triton,
)
from paged_jax.ops.inputs import Inputs
from paged_jax.ops.plan import Geometry

_INTERPRETED_CTAS = 3  # enough to split segments; the interpreter is slow


def attend(
  inputs: Inputs, *, plan: hopper_plan.Work | None, interpret: bool
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
      config = hopper_tuning.choose(
        geometry,
        inputs.num_sequences,
        inputs.max_pages,
        decode=inputs.decode,
      )
    except hopper_tuning.TooFewRows:
      # A page of fewer than 8 rows cannot be copied, and more than 64 query
      # rows of a kv head of H > 128 overflow the registers.
      return triton.attend(inputs, interpret=interpret)
    plan = hopper_plan.make_work(
      inputs.lengths,
      inputs.query_starts,
      geometry,
      config,
      hopper_tuning.num_ctas(config, inputs.num_sequences, sms),
      inputs.max_pages,
    )
  return _attend(inputs, plan, interpret)


# Jitted, so that layers of one shape are traced and lowered once (a second a
# kernel), however often a model calls it.
@functools.partial(jax.jit, static_argnums=2, inline=False)
def _attend(inputs, plan, interpret):
  partial, lse = hopper_decode.attend(inputs, plan, interpret=interpret)
  if plan.config.cut == hopper_tuning.WHOLE:
    return partial.reshape(inputs.query.shape), lse
  return hopper_merge.merge(inputs, plan, partial, lse, interpret=interpret)


def make_plan(
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None,
  geometry: Geometry,
  *,
  batch_invariant: bool = False,
  overrides: Mapping[str, Any] | None = None,
) -> hopper_plan.Work | None:
  """Returns what all layers of a step share; None if there is nothing.

  overrides: fields of hopper_tuning.Config in place of the table's, to tune.

  Raises:
    NotImplementedError: `attend` would refuse these calls.
  """
  sms = _num_sms(interpret=None)
  B, M = lengths.shape[0], page_table.shape[-1]
  try:
    config = hopper_tuning.choose(
      geometry,
      B,
      M,
      decode=query_starts is None,
      batch_invariant=batch_invariant,
      overrides=overrides,
    )
  except hopper_tuning.TooFewRows:
    if batch_invariant:
      raise
    return None  # `attend` takes another kernel
  return hopper_plan.make_work(
    lengths, query_starts, geometry, config,
    hopper_tuning.num_ctas(config, B, sms), M,
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
