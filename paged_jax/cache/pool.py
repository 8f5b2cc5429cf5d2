"""The pool of pages: all layers of K and V, allocated once.

    k_pages [L, P, K, p, H]      v_pages [L, P, K, p, H]

One page id names a page in every layer. With a combined table K and V draw
their pages from one set of ids, so one pool holds both and `v_pages` is None.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values of all layers, in pages."""

  k_pages: Float[Array, "L P K p H"]  # K and V pages both if v_pages is None
  v_pages: Float[Array, "L P K p H"] | None

  @property
  def num_pages(self) -> int:  # P
    return self.k_pages.shape[1]

  @property
  def page_size(self) -> int:  # p
    return self.k_pages.shape[3]

  @property
  def num_bytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self))


def create_cache(
  *,
  num_layers: int,
  num_pages: int,
  num_kv_heads: int,
  page_size: int,
  head_dim: int,
  dtype: Any = jnp.float32,
  combined: bool = False,
) -> Cache:
  """Returns a cache of zeros.

  Args:
    num_layers: L.
    num_pages: P, pages a layer.
    num_kv_heads: K.
    page_size: p, tokens a page.
    head_dim: H.
    dtype: a float dtype, the one of the queries.
    combined: one pool for K and V, for a table made with `combined`.

  Returns:
    The cache, `L * P * K * p * H * itemsize` bytes a pool.

  Raises:
    ValueError: a size is not a positive int.
  """
  sizes = dict(
    num_layers=num_layers,
    num_pages=num_pages,
    num_kv_heads=num_kv_heads,
    page_size=page_size,
    head_dim=head_dim,
  )
  for name, size in sizes.items():
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
      raise ValueError(f"{name} is {size!r}: pass an int of at least 1")
  shape = tuple(sizes.values())
  return Cache(
    k_pages=jnp.zeros(shape, dtype),
    v_pages=None if combined else jnp.zeros(shape, dtype),
  )
