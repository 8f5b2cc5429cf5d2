"""`paged_attention` and `plan_attention`: the two calls a model makes."""

from typing import Any

from jaxtyping import Array, Float, Int

from paged_jax.ops import implementations
from paged_jax.ops import inputs as inputs_lib
from paged_jax.ops import plan as plan_lib


def paged_attention(
  query: Float[Array, "T N H"],
  k_pages: Float[Array, "*L P K p H"],
  v_pages: Float[Array, "*L P K p H"] | None,
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  *,
  query_starts: Int[Array, "B+1"] | None = None,
  max_query_length: int | None = None,
  layer: int | Int[Array, ""] | None = None,
  scale: float | None = None,
  causal: bool = True,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  k_scale: Any = None,
  v_scale: Any = None,
  return_lse: bool = False,
  plan: plan_lib.AttentionPlan | None = None,
  implementation: str | None = None,
  interpret: bool | None = None,
) -> Float[Array, "T N H"] | tuple[
  Float[Array, "T N H"], Float[Array, "T N"]
]:
  """Attention of packed queries over keys and values kept in pages.

  With `s = scale * q . k` over the live slots a query sees (soft-capped by
  `soft_cap * tanh(s / soft_cap)`), the output is
  `sum(exp(s) v) / (sum(exp(s)) + exp(sink))`. Key j of sequence b lies at
  `pool[page_table[b, j // p], head, j % p]`:

      page_table[b]   7   2   9   null        p = 4, lengths[b] = 10
                      |   |   |
      positions      0-3 4-7 8-9              slots 28..31, 8..11, 36..37

  Only live slots are read: whatever dead slots hold changes no bit. Forward
  only: there is no gradient.

  Args:
    query: packed query tokens [T, N, H]; float32, float16 or bfloat16. "hopper"
      copies it first where T * N is no multiple of 8 and it decodes.
    k_pages: pool of keys [P, K, p, H], or [L, P, K, p, H] with `layer`, in the
      query's dtype; N a multiple of K.
    v_pages: pool of values, shaped as k_pages; None if one pool holds both (the
      table must then be [B, 2, M]).
    page_table: int32 [B, M], page ids 0..P-1, null P; or [B, 2, M], row 0
      mapping K and row 1 mapping V.
    lengths: int32 [B], KV tokens of each sequence, the new ones included,
      0..M*p.
    query_starts: int32 [B+1], sequence b owns query rows
      query_starts[b]..query_starts[b+1]-1; rows from query_starts[B] on give
      0 and LSE -inf. None: T == B, one token each.
    max_query_length: static promise that no sequence has more query tokens;
      picks the kernel. None: no promise (T).
    layer: layer of 5-D pools, an int or a traced scalar, 0..L-1.
    scale: factor on q . k, above 0; None: H**-0.5.
    causal: whether token j sees only positions up to its own,
      `length - query_length + j`.
    window: position i sees (i - window, i]; causal only.
    soft_cap: cap of the logits, above 0.
    sinks: [N] logits that join each head's denominator and nothing else.
    k_scale: scale of a quantised K pool; not implemented.
    v_scale: scale of a quantised V pool; not implemented.
    return_lse: whether to return the natural-log LSE too, sinks included.
    plan: what `plan_attention` returned for this step, shared by all layers.
    implementation: "hopper", "triton", "xla" or "reference": that one runs or
      raises. None: the fastest that can, but first what the plan has work for.
    interpret: whether Pallas kernels are interpreted. None: natively on a GPU,
      interpreted elsewhere.

  Returns:
    out [T, N, H] in the query's dtype, and with `return_lse` also lse [T, N]
    float32: 0 and -inf (with sinks: the sink) where nothing is seen.

  Raises:
    ValueError: an argument does not fit; names it, its value and the remedy.
    NotImplementedError: the named implementation cannot do this call.
  """
  if k_scale is not None or v_scale is not None:
    raise NotImplementedError(
      "k_scale and v_scale (quantised pools) are not implemented: keep the "
      "pool in float32, float16 or bfloat16"
    )
  inputs = inputs_lib.normalise(
    query,
    k_pages,
    v_pages,
    page_table,
    lengths,
    query_starts=query_starts,
    max_query_length=max_query_length,
    layer=layer,
    scale=scale,
    causal=causal,
    window=window,
    soft_cap=soft_cap,
    sinks=sinks,
  )
  if plan is not None:
    geometry = _geometry(inputs)
    plan_lib.check_plan(
      plan, page_table, lengths, query_starts, geometry, inputs.num_tokens
    )
    if plan.batch_invariant:
      if implementation not in (None, plan.implementation):
        raise ValueError(
          f"implementation is {implementation!r} but the plan is a batch-"
          f"invariant one for {plan.implementation!r}: name that or none"
        )
      implementation = plan.implementation
  interpret = implementations.resolve_interpret(interpret)
  refusals = []
  for name in _candidates(implementation, plan):
    module = implementations.load(name)
    has_work = plan is not None and plan.implementation == name
    work = plan.work if has_work else None
    try:
      out, lse = module.attend(inputs, plan=work, interpret=interpret)
    except NotImplementedError as error:
      refusals.append(f"{name}: {error}")
      continue
    return (out, lse) if return_lse else out
  raise NotImplementedError("; ".join(refusals))


def plan_attention(
  page_table: Int[Array, "B M"] | Int[Array, "B 2 M"],
  lengths: Int[Array, "B"],
  query_starts: Int[Array, "B+1"] | None = None,
  *,
  num_heads: int | None = None,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  page_size: int | None = None,
  dtype: Any = None,
  max_query_length: int | None = None,
  num_tokens: int | None = None,
  causal: bool = True,
  window: int | None = None,
  batch_invariant: bool = False,
  shared_prefix: bool = False,
  memory_order: bool = False,
  implementation: str | None = None,
) -> plan_lib.AttentionPlan:
  """Makes what all layers of one step share: work balanced over the chip.

  Call it after `advance`, with the very arrays `paged_attention` will get;
  where that runs under `shard_map`, inside it, for a device's own heads.

  Args:
    page_table: int32 [B, M] or [B, 2, M], as in `paged_attention`.
    lengths: int32 [B], KV tokens of each sequence, the new ones included.
    query_starts: int32 [B+1], or None for one token a sequence.
    num_heads: N. Where any of the five geometry arguments is missing, each call
      makes its own work and the plan only guards against stale tables; where
      all are given, calls of another geometry are refused.
    num_kv_heads: K.
    head_dim: H.
    page_size: p, tokens.
    dtype: dtype of query and pools.
    max_query_length: as in `paged_attention`; needed with query_starts.
    num_tokens: T of the calls, for a shorter plan of a prefill step, and a
      faster one where the batch is mixed. None: unknown.
    causal: as in `paged_attention`.
    window: as in `paged_attention`.
    batch_invariant: whether the output bits of a sequence must depend on that
      sequence alone, not on what else is in the batch, nor on B: its work is
      then split at places that its own length decides. Costs some speed up to
      `max_query_length` 8, beyond only with H 64 and a group of heads that is
      no power of two; by "hopper" only.
    shared_prefix: whether pages that all rows with queries begin with (the same
      ids in the first columns) are to be read once for all of them, and the
      results merged. How many there are is found in the table, on the device.
      Worth it for many rows, few queries each, over 256 such tokens or more;
      costs a little where there are fewer. Results are right either way, but
      not the bits of a plan without. Done by "hopper" in bfloat16 and
      float16, without a window; other implementations ignore it.
    memory_order: whether pages may be read in the order in which they lie in
      memory, not that of the table, which DRAM answers up to 5 % sooner, mostly
      1 to 2. Worth it where a layer reads hundreds of MB of KV from scattered
      pages of rows alike in length; costs a sort of the table. Results are
      right either way, but their last bits then depend on which pages a
      sequence has. Done by "hopper" up to `max_query_length` 8; ignored by
      others and beyond.
    implementation: as in `paged_attention`.

  Returns:
    The plan, a pytree.

  Raises:
    ValueError: an argument does not fit.
    NotImplementedError: the named implementation cannot do it
      (batch_invariant; shared_prefix on "hopper").
  """
  page_table, lengths, query_starts = _check_arrays(
    page_table, lengths, query_starts
  )
  if query_starts is None:
    max_query_length = 1
  sizes = dict(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    page_size=page_size,
    max_query_length=max_query_length,
  )
  _check_sizes(**sizes, num_tokens=num_tokens)
  inputs_lib.check_causal(causal, window)
  known = dtype is not None and None not in sizes.values()
  options = dict(
    batch_invariant=batch_invariant,
    shared_prefix=shared_prefix,
    memory_order=memory_order,
  )
  _check_options(known, **options)
  if batch_invariant:
    implementation = implementation or "hopper"
    if implementation != "hopper":
      raise NotImplementedError(
        f"batch_invariant with implementation {implementation!r}: only "
        "'hopper' can"
      )
  name = implementations.candidates(implementation)[0]
  make = getattr(implementations.load(name), "make_plan", None)
  geometry = work = None
  if known:
    geometry = plan_lib.Geometry(
      **sizes,
      dtype=inputs_lib.check_dtype("dtype", dtype),
      causal=causal,
      window=window,
      combined=page_table.ndim == 3,
    )
  if known and make is not None:
    step = page_table, lengths, query_starts
    try:
      work = make(*step, geometry, num_tokens=num_tokens, **options)
    except NotImplementedError:
      if implementation is not None:
        raise
  return plan_lib.AttentionPlan(
    page_table=page_table,
    lengths=lengths,
    query_starts=query_starts,
    work=work,
    implementation=name,
    geometry=geometry,
    num_tokens=num_tokens,
    batch_invariant=batch_invariant,
  )


def _check_arrays(page_table, lengths, query_starts):
  """Returns the arrays of a step, checked: their dtypes, axes and B."""
  combined = getattr(page_table, "ndim", None) == 3
  axes = ("B", "2", "M") if combined else ("B", "M")
  page_table = inputs_lib.as_array("page_table", page_table, axes, ("int32",))
  lengths = inputs_lib.as_array("lengths", lengths, ("B",), ("int32",))
  if query_starts is not None:
    query_starts = inputs_lib.as_array(
      "query_starts", query_starts, ("B+1",), ("int32",)
    )
    if query_starts.shape[0] != lengths.shape[0] + 1:
      raise ValueError(
        f"query_starts has {query_starts.shape[0]} entries for "
        f"B={lengths.shape[0]} sequences: it needs B+1"
      )
  if lengths.shape[0] != page_table.shape[0]:
    raise ValueError(
      f"lengths has {lengths.shape[0]} rows but page_table has "
      f"{page_table.shape[0]}: give one length a table row"
    )
  return page_table, lengths, query_starts


def _check_sizes(**sizes):
  """Raises ValueError for a size that is none; None stands for unknown."""
  for name, size in sizes.items():
    if size is not None:
      inputs_lib.check_int(name, size, 1)
  N, K = sizes["num_heads"], sizes["num_kv_heads"]
  if N and K and N % K:
    raise ValueError(
      f"num_heads is {N}, not a multiple of num_kv_heads={K}: every kv head "
      "must serve equally many query heads"
    )


def _check_options(known, **options):
  """Raises ValueError for options of a plan that do not go together.

  known: whether all of the geometry is, which each of them needs.
  """
  for option, value in options.items():
    if not isinstance(value, bool):
      raise ValueError(f"{option} is {value!r}: pass True or False")
    if value and not known:
      raise ValueError(
        f"{option} needs num_heads, num_kv_heads, head_dim, page_size, dtype "
        "and max_query_length: pass all of them"
      )
  if options["batch_invariant"] and options["shared_prefix"]:
    raise ValueError(
      "shared_prefix is True with batch_invariant=True: what is shared, and so "
      "the bits of a row, depends on the other rows; drop one of the two"
    )
  reasons = dict(
    batch_invariant="the bits of a row would depend on where its pages lie",
    shared_prefix="a prefix is found by its place in the table",
  )
  for other, why in reasons.items():
    if options["memory_order"] and options[other]:
      raise ValueError(
        f"memory_order is True with {other}=True: {why}; drop one of the two"
      )


def _candidates(implementation, plan):
  """The names to try in order; the one that the plan has work for first."""
  names = implementations.candidates(implementation)
  if plan is None or plan.work is None or plan.implementation not in names:
    return names
  return plan.implementation, *(x for x in names if x != plan.implementation)


def _geometry(inputs: inputs_lib.Inputs) -> plan_lib.Geometry:
  return plan_lib.Geometry(
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
