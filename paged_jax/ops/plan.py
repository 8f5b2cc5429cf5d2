"""A plan of one attention step: made once, shared by all layers.

Balancing ragged rows over a chip takes a dozen small operations on `lengths`.
All layers of a step have the same lengths, so this work is done once:

    plan = plan_attention(table, lengths, starts, ...)     # once a step
    for layer in range(L):
      paged_attention(..., layer=layer, plan=plan)

Implementations that need no plan ignore it.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int
import numpy as np

from paged_jax.ops import inputs as inputs_lib

# Where a call's value may not be one that was passed.
_BY_DEFAULT = dict(max_query_length=" (T where it passes none)")

# What `plan_attention` can be asked for, all off by default.
OPTIONS = ("batch_invariant", "shared_prefix", "memory_order")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """The static facts of a call that an implementation's work depends on."""

  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  page_size: int  # p
  dtype: str
  max_query_length: int
  causal: bool
  window: int | None
  combined: bool  # whether V has a table of its own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
  """What a step's layers share, and what it was made from.

  A pytree: it passes through jit, scan and donate like any other state.
  """

  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"]
  lengths: Int[Array, "B"]
  query_starts: Int[Array, "B+1"] | None  # None: one token a sequence
  work: Any  # the implementation's own arrays; None if it needs none
  # The implementation that `work` is for.
  implementation: str = dataclasses.field(metadata=dict(static=True))
  # None if plan_attention was not told all of it: then `work` is None too.
  geometry: Geometry | None = dataclasses.field(metadata=dict(static=True))
  # T that `work` is for; None: any.
  num_tokens: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )
  # Whether a sequence's output must not depend on the rest of the batch.
  batch_invariant: bool = dataclasses.field(
    default=False, metadata=dict(static=True)
  )


def check_plan(
  plan: AttentionPlan,
  page_table: Any,
  lengths: Any,
  query_starts: Any,
  geometry: Geometry,
  num_tokens: int,
) -> None:
  """Raises ValueError where `plan` was made for another step or geometry.

  Shapes and geometry are checked always, contents in eager mode only: under
  jit they are unknown.
  """
  if not isinstance(plan, AttentionPlan):
    raise ValueError(
      f"plan is a {type(plan).__name__}: pass what plan_attention returned"
    )
  if plan.geometry is not None:
    made, now = vars(plan.geometry), vars(geometry)
    for name, value in now.items():
      if made[name] != value:
        raise ValueError(
          f"plan was made for {name}={made[name]!r} but this call has "
          f"{value!r}{_BY_DEFAULT.get(name, '')}: give plan_attention the same "
          "arguments as the call"
        )
  if plan.num_tokens not in (None, num_tokens):
    raise ValueError(
      f"plan was made for num_tokens={plan.num_tokens} but query has "
      f"T={num_tokens} tokens: give plan_attention T, or no num_tokens"
    )
  pairs = (
    ("page_table", plan.page_table, page_table),
    ("lengths", plan.lengths, lengths),
    ("query_starts", plan.query_starts, query_starts),
  )
  for name, made, now in pairs:
    if (made is None) != (now is None):
      raise ValueError(
        f"plan was made {'without' if made is None else 'with'} {name} but "
        "this call is the other way round: call plan_attention with the same "
        "arguments"
      )
    if made is None:
      continue
    if made.shape != now.shape:
      raise ValueError(
        f"plan was made for {name} of shape {made.shape} but this call has "
        f"{now.shape}: call plan_attention again for this step"
      )
    if not inputs_lib.is_concrete(made, now):
      continue
    if not np.array_equal(np.asarray(made), np.asarray(now)):
      raise ValueError(
        f"plan is stale: {name} has changed since plan_attention made it; "
        "call plan_attention again for this step"
      )


def check_options(options: Sequence[str]) -> tuple[str, ...]:
  """Returns names of plan options after checking them.

  Raises:
    ValueError: one is unknown.
  """
  if isinstance(options, str) or not set(options) <= set(OPTIONS):
    raise ValueError(
      f"plan_options is {options!r}: pass a sequence of {', '.join(OPTIONS)}"
    )
  return tuple(options)
