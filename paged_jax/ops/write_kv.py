"""The slot writer: new K and V rows go to their slots in the pool.

    slot = page * p + offset        pool[layer, page, head, offset] = k[t, head]

One scatter with three index axes: XLA keeps it in place when the pool is
donated. Slots outside 0..P*p-1 (the null slot P*p, or any negative one) are
dropped.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_jax.ops import inputs as inputs_lib


def write_kv(
  k_pages: Float[Array, "*L P K p H"],
  v_pages: Float[Array, "*L P K p H"] | None,
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  slots: Int[Array, "T"] | Int[Array, "2 T"],
  *,
  layer: int | Int[Array, ""] | None = None,
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

  Returns:
    (k_pages, v_pages) with the tokens written; v_pages None if it was None.

  Raises:
    ValueError: an argument's rank, dtype or size does not fit; names it.
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
  k_slots, v_slots = _slots(slots, k.shape[0], v_pages is None)

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
    at = () if at_layer is None else (at_layer,)
    return pool.at[*at, page, :, offset].set(rows, mode="drop")

  k_pages = put(k_pages, k, k_slots)
  if v_pages is None:
    return put(k_pages, v, v_slots), None
  return k_pages, put(v_pages, v, v_slots)


def _slots(slots: Any, num_tokens: int, one_pool: bool):
  pair = getattr(slots, "ndim", None) == 2
  axes = ("2", "T") if pair or one_pool else ("T",)
  slots = inputs_lib.as_array("slots", slots, axes, ("int32",))
  if slots.shape[-1] != num_tokens:
    raise ValueError(
      f"slots has {slots.shape[-1]} entries for T={num_tokens} tokens: give "
      "one slot a token (the null slot drops it)"
    )
  if not pair:
    return slots, slots
  if slots.shape[0] != 2:
    raise ValueError(
      f"slots has shape {slots.shape}: pass [2, T], row 0 for K, row 1 for V"
    )
  return slots[0], slots[1]
