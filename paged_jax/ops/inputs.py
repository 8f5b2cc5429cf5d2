"""What every implementation of paged attention receives, checked once.

`paged_attention` (api.py) accepts several spellings: 4-D or 5-D pools, one or
two pools, separate or combined tables, packed or one-token queries. This file
turns all of them into one `Inputs`, so that an implementation sees exactly one
layout:

    query    [T, N, H]        T packed query tokens
    k_pages  [L, P, K, p, H]  always 5-D; `layer` picks the layer in the kernel
    k_table  [B, M]           int32, null entry = P
    v_table  [B, M]           the same array as k_table unless `combined`
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

FLOATS = ("bfloat16", "float16", "float32", "float64")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Normalised arguments of one paged-attention call.

  Token j of sequence b is query row `query_starts[b] + j` and sits at position
  `lengths[b] - query_length[b] + j` of its sequence.
  """

  query: Float[Array, "T N H"]
  k_pages: Float[Array, "L P K p H"]
  v_pages: Float[Array, "L P K p H"]
  k_table: Int[Array, "B M"]  # null entry = P
  v_table: Int[Array, "B M"]  # equals k_table unless `combined`
  lengths: Int[Array, "B"]  # KV tokens, the new ones included
  query_starts: Int[Array, "B+1"]
  layer: Int[Array, ""]
  sinks: Float[Array, "N"] | None
  scale: float = dataclasses.field(metadata=dict(static=True))
  causal: bool = dataclasses.field(metadata=dict(static=True))
  window: int | None = dataclasses.field(metadata=dict(static=True))
  soft_cap: float | None = dataclasses.field(metadata=dict(static=True))
  # No sequence has more query tokens than this (a promise of the caller).
  max_query_length: int = dataclasses.field(metadata=dict(static=True))
  # Whether V has a table of its own.
  combined: bool = dataclasses.field(metadata=dict(static=True))
  # Whether query_starts was omitted: T == B, one token a sequence.
  decode: bool = dataclasses.field(metadata=dict(static=True))

  @property
  def num_tokens(self) -> int:  # T
    return self.query.shape[0]

  @property
  def num_heads(self) -> int:  # N
    return self.query.shape[1]

  @property
  def head_dim(self) -> int:  # H
    return self.query.shape[2]

  @property
  def num_pages(self) -> int:  # P
    return self.k_pages.shape[1]

  @property
  def num_kv_heads(self) -> int:  # K
    return self.k_pages.shape[2]

  @property
  def page_size(self) -> int:  # p
    return self.k_pages.shape[3]

  @property
  def group_size(self) -> int:  # G = N / K
    return self.num_heads // self.num_kv_heads

  @property
  def num_sequences(self) -> int:  # B
    return self.k_table.shape[0]

  @property
  def max_pages(self) -> int:  # M
    return self.k_table.shape[1]

  @property
  def accumulator_dtype(self) -> jnp.dtype:
    """float32, or float64 for float64 inputs (the test oracle)."""
    return jnp.promote_types(self.query.dtype, jnp.float32)


def normalise(
  query: Any,
  k_pages: Any,
  v_pages: Any,
  page_table: Any,
  lengths: Any,
  *,
  query_starts: Any = None,
  max_query_length: int | None = None,
  layer: Any = None,
  scale: float | None = None,
  causal: bool = True,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: Any = None,
) -> Inputs:
  """Checks the arguments of `paged_attention` and brings them to one layout.

  Args and Raises: see `paged_jax.ops.api.paged_attention`.
  """
  query = as_array("query", query, ("T", "N", "H"), FLOATS)
  num_tokens, num_heads, head_dim = query.shape
  one_pool, decode = v_pages is None, query_starts is None
  k_pages, v_pages, at_layer = _pools(query, k_pages, v_pages, layer)
  k_table, v_table, combined = _tables(page_table, one_pool)
  lengths = as_array("lengths", lengths, ("B",), ("int32",))
  num_sequences = k_table.shape[0]
  if lengths.shape[0] != num_sequences:
    raise ValueError(
      f"lengths has {lengths.shape[0]} rows but page_table has "
      f"{num_sequences}: give one length a table row"
    )
  query_starts, max_query_length = _starts(
    query_starts, max_query_length, num_tokens, num_sequences
  )
  if sinks is not None:
    sinks = as_array("sinks", sinks, ("N",), FLOATS)
    if sinks.shape[0] != num_heads:
      raise ValueError(
        f"sinks has {sinks.shape[0]} entries but query has N={num_heads} "
        "heads: give one sink logit a query head"
      )
    sinks = sinks.astype(jnp.promote_types(query.dtype, jnp.float32))
  check_causal(causal, window)
  inputs = Inputs(
    query=query,
    k_pages=k_pages,
    v_pages=v_pages,
    k_table=k_table,
    v_table=v_table,
    lengths=lengths,
    query_starts=query_starts,
    layer=at_layer,
    sinks=sinks,
    scale=_positive("scale", scale) if scale is not None else head_dim**-0.5,
    causal=bool(causal),
    window=None if window is None else int(window),
    soft_cap=None if soft_cap is None else _positive("soft_cap", soft_cap),
    max_query_length=int(max_query_length),
    combined=combined,
    decode=decode,
  )
  _check_values(inputs)
  return inputs


def as_array(
  name: str, value: Any, axes: tuple[str, ...], dtypes: tuple[str, ...]
) -> Array:
  """Returns `value` as an array of rank len(axes) with one of `dtypes`."""
  shape = f"[{', '.join(axes)}]"
  if not hasattr(value, "shape") or not hasattr(value, "dtype"):
    raise ValueError(
      f"{name} is a {type(value).__name__}: pass an array of shape {shape}"
    )
  if value.ndim != len(axes):
    raise ValueError(
      f"{name} has shape {tuple(value.shape)}, rank {value.ndim}: reshape it "
      f"to {shape}"
    )
  if str(value.dtype) not in dtypes:
    raise ValueError(
      f"{name} has dtype {value.dtype}: cast it to one of {', '.join(dtypes)}"
    )
  return jnp.asarray(value)


def as_pool(
  name: str, pool: Any, layer: Any
) -> tuple[Array, Int[Array, ""] | None]:
  """Checks one pool and its layer; returns both, layer None for a 4-D pool."""
  stacked = getattr(pool, "ndim", None) == 5
  axes = ("L", "P", "K", "p", "H") if stacked else ("P", "K", "p", "H")
  pool = as_array(name, pool, axes, FLOATS)
  if 0 in pool.shape:
    raise ValueError(
      f"{name} has shape {pool.shape}: every axis needs at least 1"
    )
  if stacked and layer is None:
    raise ValueError(
      f"layer is missing for {name} of shape {pool.shape}: pass the layer's "
      "index, an int or a traced scalar"
    )
  if not stacked and layer is not None:
    raise ValueError(
      f"layer is {layer!r} but {name} has one layer, shape {pool.shape}: drop "
      "layer or pass a pool [L, P, K, p, H]"
    )
  return pool, as_layer(layer, pool.shape[0]) if stacked else None


def as_layer(layer: Any, num_layers: int) -> Int[Array, ""]:
  """Checks the `layer` of a stacked pool and returns it as an int32 scalar."""
  is_int = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
  if is_int:
    if not 0 <= layer < num_layers:
      raise ValueError(
        f"layer is {layer} but the pool has L={num_layers} layers: pass 0 to "
        f"{num_layers - 1}"
      )
    return jnp.int32(layer)
  if getattr(layer, "ndim", None) != 0 or not jnp.issubdtype(
    layer.dtype, jnp.integer
  ):
    raise ValueError(
      f"layer is {layer!r}: pass a Python int or a scalar integer array"
    )
  if is_concrete(layer):
    return as_layer(int(layer), num_layers)
  return layer.astype(jnp.int32)


def check_addressable(num_pages: int, page_size: int) -> None:
  """Raises unless every slot id, the null slot P * p included, is an int32."""
  if num_pages * page_size >= 2**31:
    raise ValueError(
      f"the pool has P={num_pages} pages of p={page_size} tokens, "
      f"{num_pages * page_size} slots: slot ids are int32; use fewer pages"
    )


def check_int(name: str, value: Any, least: int) -> None:
  """Raises ValueError unless `value` is an int of at least `least`."""
  is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not is_int or value < least:
    raise ValueError(f"{name} is {value!r}: pass an int of at least {least}")


def check_causal(causal: Any, window: Any) -> None:
  """Raises ValueError where one is no such value, or they do not fit."""
  if not isinstance(causal, bool | np.bool_):
    raise ValueError(f"causal is {causal!r}: pass True or False")
  if window is not None:
    check_int("window", window, 1)
    if not causal:
      raise ValueError(
        f"window is {window} with causal=False: a sliding window is defined "
        "for causal attention only; drop one of the two"
      )


def check_dtype(name: str, value: Any) -> str:
  """Returns the name of a dtype that attention can have."""
  try:
    dtype = None if value is None else str(jnp.dtype(value))
  except TypeError:
    dtype = None
  if dtype not in FLOATS:
    raise ValueError(f"{name} is {value!r}: pass one of {', '.join(FLOATS)}")
  return dtype


def is_concrete(*arrays: Any) -> bool:
  """Whether all arrays hold values now, that is, outside of any trace."""
  return not any(isinstance(x, core.Tracer) for x in arrays)


def _pools(query, k_pages, v_pages, layer):
  """Returns both pools, 5-D and fit for the query, and which layer to read."""
  k_pages, at_layer = as_pool("k_pages", k_pages, layer)
  if v_pages is None:
    v_pages = k_pages
  else:
    v_pages, _ = as_pool("v_pages", v_pages, layer)
    if v_pages.shape != k_pages.shape:
      raise ValueError(
        f"v_pages has shape {v_pages.shape} but k_pages has {k_pages.shape}: "
        "both pools must have the same shape; allocate them together"
      )
  for name, pool in (("k_pages", k_pages), ("v_pages", v_pages)):
    if pool.dtype != query.dtype:
      raise ValueError(
        f"{name} has dtype {pool.dtype} but query has {query.dtype}: cast the "
        "query, or allocate the pool in the query's dtype"
      )
  if at_layer is None:
    k_pages, v_pages, at_layer = k_pages[None], v_pages[None], jnp.int32(0)
  _, num_pages, num_kv_heads, page_size, pool_dim = k_pages.shape
  _, num_heads, head_dim = query.shape
  if pool_dim != head_dim:
    raise ValueError(
      f"k_pages has head dim {pool_dim} but query has {head_dim}: their last "
      "axes must agree"
    )
  if num_heads % num_kv_heads:
    raise ValueError(
      f"query has N={num_heads} heads, not a multiple of K={num_kv_heads} in "
      "k_pages: every kv head must serve the same number of query heads"
    )
  check_addressable(num_pages, page_size)
  return k_pages, v_pages, at_layer


def _tables(page_table, one_pool):
  combined = getattr(page_table, "ndim", None) == 3
  axes = ("B", "2", "M") if combined or one_pool else ("B", "M")
  table = as_array("page_table", page_table, axes, ("int32",))
  if combined and table.shape[1] != 2:
    raise ValueError(
      f"page_table has shape {table.shape}: a combined table is [B, 2, M], "
      "row 0 for K and row 1 for V"
    )
  if table.shape[-1] == 0:
    raise ValueError(
      f"page_table has shape {table.shape}: its width M must be at least 1"
    )
  if not combined:
    return table, table, False
  return table[:, 0], table[:, 1], True


def _starts(query_starts, max_query_length, num_tokens, num_sequences):
  """Returns query_starts and max_query_length, of one token each if omitted."""
  if query_starts is None:
    if num_tokens != num_sequences:
      raise ValueError(
        f"query has T={num_tokens} tokens for B={num_sequences} sequences and "
        "query_starts is omitted, which means one token a sequence: pass "
        "query_starts [B+1] for packed queries"
      )
    if max_query_length not in (None, 1):
      raise ValueError(
        f"max_query_length is {max_query_length} but query_starts is omitted, "
        "which means one token a sequence: omit it or pass query_starts"
      )
    return jnp.arange(num_sequences + 1, dtype=jnp.int32), 1
  query_starts = as_array("query_starts", query_starts, ("B+1",), ("int32",))
  if query_starts.shape[0] != num_sequences + 1:
    raise ValueError(
      f"query_starts has {query_starts.shape[0]} entries for "
      f"B={num_sequences} sequences: it needs B+1={num_sequences + 1}, the "
      "last one being the number of tokens used"
    )
  if max_query_length is None:
    max_query_length = max(num_tokens, 1)
  check_int("max_query_length", max_query_length, 1)
  return query_starts, max_query_length


def _positive(name, value):
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(
      f"{name} is {value!r}: pass a Python number (it is compiled in)"
    )
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f"{name} is {value!r}: pass a finite number above 0")
  return float(value)


def _check_values(inputs: Inputs) -> None:
  """Eager mode only: raises where a value makes the call meaningless."""
  arrays = (
    inputs.k_table,
    inputs.v_table,
    inputs.lengths,
    inputs.query_starts,
  )
  if not is_concrete(*arrays):
    return
  k_table, v_table, lengths, starts = map(np.asarray, arrays)
  capacity = inputs.max_pages * inputs.page_size
  if lengths.size and (lengths.min() < 0 or lengths.max() > capacity):
    raise ValueError(
      f"lengths is {lengths.tolist()}: each must lie in 0..{capacity}, the "
      f"M={inputs.max_pages} pages of p={inputs.page_size} tokens of a row"
    )
  steps = np.diff(starts)
  if starts[0] != 0 or starts[-1] > inputs.num_tokens or (steps < 0).any():
    raise ValueError(
      f"query_starts is {starts.tolist()}: it must start at 0, never fall, "
      f"and end at T={inputs.num_tokens} or below"
    )
  if steps.size and steps.max() > inputs.max_query_length:
    raise ValueError(
      f"max_query_length is {inputs.max_query_length} but query_starts holds "
      f"a sequence of {steps.max()} tokens: raise it or split the sequence"
    )
  page_start = np.arange(inputs.max_pages) * inputs.page_size
  live = page_start < lengths[:, None]
  if inputs.window is not None:
    # Pages that no query sees any more may already have been given back.
    first = lengths - steps - inputs.window + 1
    live &= page_start + inputs.page_size > first[:, None]
  for table in (k_table, v_table):
    bad = live & ((table < 0) | (table >= inputs.num_pages))
    if bad.any():
      row, column = np.argwhere(bad)[0]
      raise ValueError(
        f"page_table entry [{row}, {column}] is {table[row, column]} but "
        f"lengths[{row}] is {lengths[row]}: entries below a row's length must "
        f"lie in 0..{inputs.num_pages - 1}; reserve pages first"
      )
