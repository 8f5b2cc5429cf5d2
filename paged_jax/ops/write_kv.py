"""The slot writer: new K and V rows go to their slots in the pool.

    slot = page * p + offset        pool[layer, page, head, offset] = k[t, head]

Slots outside 0..P*p-1 (the null slot P*p, or any negative one) are dropped. Two
implementations, both in place when the pools are donated:

    xla       a scatter each for K and V, with three index axes
    triton    one kernel for both, see triton_write.py: 1.5 us against 2.6 for
              one token and 24 against 151 for 8192 on an H100 (K = 8, H = 128,
              bfloat16), where the bytes alone take 22
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops import implementations, triton_write
from paged_jax.ops import inputs as inputs_lib

IMPLEMENTATIONS = ("xla", "triton")


def write_kv(
  k_pages: Float[Array, "*L P K p H"],
  v_pages: Float[Array, "*L P K p H"] | None,
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  slots: Int[Array, "T"] | Int[Array, "2 T"],
  *,
  layer: int | Int[Array, ""] | None = None,
  implementation: str | None = None,
  interpret: bool | None = None,
) -> tuple[Float[Array, "*L P K p H"], Float[Array, "*L P K p H"] | None]:
  """Writes T new tokens to their slots; every other element keeps its bits.

  Of two tokens with one slot, either may win: `slot_mapping` makes none.

  Args:
    k_pages: pool [P, K, p, H], or [L, P, K, p, H] for L layers; any float.
    v_pages: the pool of V, same shape and dtype; None if `k_pages` holds K and
      V pages both (then slots must be [2, T]).
    k: new keys [T, K, H], in the pool's dtype.
    v: new values [T, K, H], in the pool's dtype.
    slots: int32 [T], `page * p + offset`, or [2, T], row 0 for K and row 1 for
      V. A slot outside 0..P*p-1 drops its token.
    layer: index of the layer in a 5-D pool, an int or a traced scalar.
    implementation: "xla" or "triton": that one runs or raises. None: the
      fastest that can, triton on a GPU and xla elsewhere.
    interpret: whether triton is interpreted. None: natively on a GPU,
      interpreted elsewhere.

  Returns:
    (k_pages, v_pages) with the tokens written; v_pages None if it was None.

  Raises:
    ValueError: an argument's rank, dtype or size does not fit; names it.
    NotImplementedError: the named implementation cannot do this call.
  """
  k_pages, at_layer = inputs_lib.as_pool("k_pages", k_pages, layer)
  if v_pages is not None:
    v_pages, _ = inputs_lib.as_pool("v_pages", v_pages, layer)
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
      raise ValueError(
        f"v_pages is {v_pages.dtype}{v_pages.shape} but k_pages is "
        f"{k_pages.dtype}{k_pages.shape}: both pools must agree; allocate "
        "them together"
      )
  *_, num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
  inputs_lib.check_addressable(num_pages, page_size)
  for name, rows in (("k", k), ("v", v)):
    rows = inputs_lib.as_array(name, rows, ("T", "K", "H"), inputs_lib.FLOATS)
    if rows.shape[1:] != (num_kv_heads, head_dim):
      raise ValueError(
        f"{name} has shape {rows.shape} but the pool has K={num_kv_heads}, "
        f"H={head_dim}: pass [T, {num_kv_heads}, {head_dim}]"
      )
    if rows.dtype != k_pages.dtype:
      raise ValueError(
        f"{name} has dtype {rows.dtype} but the pool has {k_pages.dtype}: "
        f"cast it with {name}.astype(pool.dtype)"
      )
  if k.shape != v.shape:
    raise ValueError(
      f"v has shape {v.shape} but k has {k.shape}: write as many values as keys"
    )
  slots = _slots(slots, k.shape[0], v_pages is None)
  pools = (k_pages,) if v_pages is None else (k_pages, v_pages)
  interpret = implementations.resolve_interpret(interpret)
  for name in _candidates(implementation):
    try:
      if name == "triton":
        pools = _triton(pools, k, v, slots, at_layer, interpret)
      else:
        pools = _xla(pools, k, v, slots, at_layer)
      break
    except NotImplementedError:
      if implementation is not None:
        raise
  return (*pools, None)[:2]


def _candidates(name: str | None) -> tuple[str, ...]:
  if name is not None and name not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation is {name!r}: pass None (automatic), 'xla' or 'triton'"
    )
  if name is not None:
    return (name,)
  on_gpu = jax.default_backend() in ("gpu", "cuda")
  return ("triton", "xla") if on_gpu else ("xla",)


def _triton(pools, k, v, slots, layer, interpret):
  shape = pools[0].shape
  if layer is None:
    layer = jnp.int32(0)
    pools = tuple(pool[None] for pool in pools)
  out = triton_write.write(pools, k, v, slots, layer, interpret=interpret)
  return tuple(pool.reshape(shape) for pool in out)


def _xla(pools, k, v, slots, layer):
  *_, num_pages, _, page_size, _ = pools[0].shape

  def put(pool, rows, slots):
    if rows.shape[0] == 1:
      # XLA turns a scatter of one row into a select over the whole pool, which
      # copies it: a second row, dropped, keeps it a scatter.
      rows = jnp.concatenate([rows, rows])
      slots = jnp.concatenate([slots, jnp.full_like(slots, -1)])
    # Negative indices wrap before mode="drop" sees them: send them to P too.
    inside = (slots >= 0) & (slots < num_pages * page_size)
    page = jnp.where(inside, slots // page_size, num_pages)
    offset = jnp.where(inside, slots % page_size, 0)
    at = () if layer is None else (layer,)
    return pool.at[*at, page, :, offset].set(rows, mode="drop")

  k_slots, v_slots = slots if slots.ndim == 2 else (slots, slots)
  if len(pools) == 1:
    return (put(put(pools[0], k, k_slots), v, v_slots),)
  return put(pools[0], k, k_slots), put(pools[1], v, v_slots)


def _slots(slots: Any, num_tokens: int, one_pool: bool):
  pair = getattr(slots, "ndim", None) == 2
  axes = ("2", "T") if pair or one_pool else ("T",)
  slots = inputs_lib.as_array("slots", slots, axes, ("int32",))
  if slots.shape[-1] != num_tokens:
    raise ValueError(
      f"slots has {slots.shape[-1]} entries for T={num_tokens} tokens: give "
      "one slot a token (the null slot drops it)"
    )
  if pair and slots.shape[0] != 2:
    raise ValueError(
      f"slots has shape {slots.shape}: pass [2, T], row 0 for K, row 1 for V"
    )
  return slots
