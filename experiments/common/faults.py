"""Faults that a verification must find, put into the paged path on purpose.

Two kinds. Arguments of every attention layer:

    mask    tokens see what follows them; a decode step loses its newest token
    slot    every token is written one slot further
    table   attention reads the page after the right one
    scale   logits twice as large

and one token of one layer in the cache, after the prefill:

    poison  its key is NaN
    shift   its key and value lie one slot further
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from paged_jax.cache.pool import Cache
from paged_jax.models import attention
from paged_jax.models.step import Step
from paged_jax.ops import api
from paged_jax.ops import write_kv as write_kv_lib

ARGUMENTS = ("mask", "slot", "table", "scale")
TOKENS = ("poison", "shift")
NAMES = ARGUMENTS + TOKENS


@functools.cache  # a function of its own would be a program of its own
def attend_with(fault: str | None) -> attention.Attend:
  """Returns the library's `attend_paged`, or one with a wrong argument."""
  if fault not in ARGUMENTS:
    return attention.attend_paged

  def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: Cache,
    step: Step,
    *,
    layer: int,
    config: attention.AttentionConfig,
  ) -> tuple[Float[Array, "T N H"], Cache]:
    slots, table, lengths = step.slots, step.page_table, step.lengths
    causal, scale, P = True, config.head_dim**-0.5, cache.num_pages
    if fault == "mask":
      causal = False
      if step.query_starts is None:
        lengths = jnp.maximum(lengths - 1, 0)
    elif fault == "slot":
      null = P * cache.page_size
      slots = jnp.where(slots < null, (slots + 1) % null, null)
    elif fault == "table":
      table = jnp.where(table < P, (table + 1) % P, P)
    elif fault == "scale":
      scale *= 2
    k_pages, v_pages = write_kv_lib.write_kv(
      cache.k_pages, cache.v_pages, k, v, slots, layer=layer
    )
    out = api.paged_attention(
      q,
      k_pages,
      v_pages,
      table,
      lengths,
      query_starts=step.query_starts,
      max_query_length=step.max_query_length,
      layer=layer,
      scale=scale,
      causal=causal,
      window=config.window if causal else None,
      soft_cap=config.soft_cap,
      implementation=step.implementation,
      interpret=step.interpret,
    )
    return out, Cache(k_pages=k_pages, v_pages=v_pages)

  return attend


def tamper(
  cache: Cache, fault: str | None, slots: tuple[int, int]
) -> Cache:
  """Returns the cache with one token of its middle layer spoilt.

  Args:
    cache: pools.
    fault: one of `TOKENS`; anything else changes nothing.
    slots: of the token's key and value.
  """
  if fault not in TOKENS:
    return cache
  layer, p = cache.k_pages.shape[0] // 2, cache.page_size

  def put(pool, slot, value):
    return pool.at[layer, slot // p, :, slot % p].set(value)

  def spoil(pool, slot):
    if fault == "poison":
      return put(pool, slot, np.nan)
    after = (slot + 1) % (cache.num_pages * p)
    token = pool[layer, slot // p, :, slot % p]
    return put(put(pool, slot, np.nan), after, token)

  k_pages, v_pages = spoil(cache.k_pages, slots[0]), cache.v_pages
  if fault == "shift":
    if v_pages is None:
      k_pages = spoil(k_pages, slots[1])
    else:
      v_pages = spoil(v_pages, slots[1])
  return jax.tree.map(
    jnp.asarray, Cache(k_pages=k_pages, v_pages=v_pages)
  )
