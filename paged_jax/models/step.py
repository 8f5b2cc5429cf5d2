"""One step of a model over a page table: which tokens go where.

    table --reserve--> slots --advance--> lengths, pages --plan--> Step

A `Step` is all that the layers need besides weights, tokens and the cache. It
is made once and shared by all of them. The layer writes K and V to `slots`
before it attends, so the table may advance first: slots are taken before.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_jax.cache import page_table as page_table_lib
from paged_jax.cache.page_table import PageTable
from paged_jax.models.attention import AttentionConfig
from paged_jax.ops import api
from paged_jax.ops import plan as plan_lib
from paged_jax.ops.plan import AttentionPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """Where the T packed tokens of one step sit."""

  positions: Int[Array, "T"]  # of each token in its sequence
  slots: Int[Array, "T"] | Int[Array, "2 T"]  # in the pool; null = P * p
  query_starts: Int[Array, "B+1"] | None  # None: decode, one token a row
  lengths: Int[Array, "B"]  # KV tokens, the new ones included
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"]
  plan: AttentionPlan | None
  plan_options: tuple[str, ...] = dataclasses.field(
    default=(), metadata=dict(static=True)
  )
  # No row has more tokens in this step; None for decode.
  max_query_length: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )
  implementation: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )
  interpret: bool | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  def plan_for(self, config: AttentionConfig) -> AttentionPlan | None:
    """Returns the plan for a layer: another one where its window is another."""
    geometry = self.plan and self.plan.geometry
    if geometry is None or geometry.window == config.window:
      return self.plan
    return _plan(self, config, geometry.page_size)


def prefill_step(
  table: PageTable,
  num_tokens: Int[Array, "B"],
  config: AttentionConfig,
  *,
  total: int,
  plan_options: Sequence[str] = (),
  implementation: str | None = None,
  interpret: bool | None = None,
) -> tuple[PageTable, Step, Bool[Array, "B"]]:
  """Reserves and maps `num_tokens[b]` new tokens of each row, packed.

  Args:
    table: the table.
    num_tokens: int32 [B], new tokens a row, 0 for rows that sit out.
    config: the attention geometry, for the plan.
    total: T, static number of packed tokens; those beyond the sum are idle.
    plan_options: those of `plan_attention` to turn on: "memory_order",
      "shared_prefix", "batch_invariant".
    implementation: as in `paged_attention`.
    interpret: as in `paged_attention`.

  Returns:
    (table, step, ok): the advanced table, and ok [B], whether the row got its
    pages and its tokens lie within T. Nothing is written for a row that did
    not, and what lies beyond T sits out.
  """
  num_tokens = page_table_lib.per_row(
    "num_tokens", num_tokens, table, jnp.int32
  )
  # Clipped, so that the sum does not wrap.
  within = jnp.cumsum(jnp.minimum(num_tokens, total + 1)) <= total
  within |= num_tokens == 0
  num_tokens = jnp.where(within, num_tokens, 0)
  reserved, ok = page_table_lib.reserve(table, num_tokens)
  ok &= within
  slots = page_table_lib.slot_mapping(reserved, num_tokens, total)
  advanced = page_table_lib.advance(reserved, num_tokens)
  starts = jnp.cumulative_sum(num_tokens, include_initial=True)
  starts = starts.astype(jnp.int32)
  token = jnp.arange(total, dtype=jnp.int32)
  row = jnp.searchsorted(starts[1:], token, side="right")
  row = jnp.minimum(row, table.num_sequences - 1)
  step = _step(
    advanced,
    config,
    plan_options,
    positions=table.lengths[row] + token - starts[row],
    slots=slots,
    query_starts=starts,
    # A row without its new tokens must not attend as if it had them.
    lengths=jnp.where(ok, advanced.lengths, 0),
    max_query_length=total,
    implementation=implementation,
    interpret=interpret,
  )
  return advanced, step, ok


def decode_step(
  table: PageTable,
  active: Bool[Array, "B"],
  config: AttentionConfig,
  *,
  plan_options: Sequence[str] = (),
  implementation: str | None = None,
  interpret: bool | None = None,
) -> tuple[PageTable, Step, Bool[Array, "B"]]:
  """Reserves and maps one new token of each active row; T == B.

  Args:
    table: the table.
    active: bool [B]; the tokens of other rows are idle.
    config: the attention geometry, for the plan.
    plan_options: as in `prefill_step`.
    implementation: as in `paged_attention`.
    interpret: as in `paged_attention`.

  Returns:
    (table, step, ok): the advanced table, and ok [B], whether the row is
    active and got its page.
  """
  reserved, ok = page_table_lib.reserve(table, active.astype(jnp.int32))
  ok &= active
  # Token b is row b's even where rows sit out, so all rows are mapped, and
  # idle ones sent to the null slot.
  ones = jnp.ones_like(table.lengths)
  slots = page_table_lib.slot_mapping(reserved, ones, table.num_sequences)
  slots = jnp.where(ok, slots, table.null * table.page_size)
  advanced = page_table_lib.advance(reserved, ok.astype(jnp.int32))
  step = _step(
    advanced,
    config,
    plan_options,
    positions=table.lengths,
    slots=slots,
    query_starts=None,
    lengths=jnp.where(ok, advanced.lengths, 0),
    max_query_length=None,
    implementation=implementation,
    interpret=interpret,
  )
  return advanced, step, ok


def _step(table, config, plan_options, **fields):
  step = Step(
    page_table=table.pages,
    plan=None,
    plan_options=plan_lib.check_options(plan_options),
    **fields,
  )
  plan = _plan(step, config, table.page_size)
  return dataclasses.replace(step, plan=plan)


def _plan(step, config, page_size):
  return api.plan_attention(
    step.page_table,
    step.lengths,
    step.query_starts,
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    page_size=page_size,
    dtype=config.dtype,
    max_query_length=step.max_query_length,
    num_tokens=step.positions.shape[0],
    window=config.window,
    implementation=step.implementation,
    **dict.fromkeys(step.plan_options, True),
  )
