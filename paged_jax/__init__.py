"""paged_jax: paged attention for JAX.

    table, ok = reserve(table, num_tokens)            pages for the new tokens
    slots = slot_mapping(table, num_tokens, total)    where they go
    pools = write_kv(*pools, k, v, slots)             put them there
    table = advance(table, num_tokens)                they count from now on
    out = paged_attention(query, *pools, table.pages, table.lengths)
"""

import importlib
from typing import Any

from paged_jax.cache.fork import copy_on_write as copy_on_write
from paged_jax.cache.fork import copy_pages as copy_pages
from paged_jax.cache.fork import fork as fork
from paged_jax.cache.invariants import check_invariants as check_invariants
from paged_jax.cache.page_table import PageTable as PageTable
from paged_jax.cache.page_table import advance as advance
from paged_jax.cache.page_table import create_page_table as create_page_table
from paged_jax.cache.page_table import release as release
from paged_jax.cache.page_table import reserve as reserve
from paged_jax.cache.page_table import slot_mapping as slot_mapping
from paged_jax.ops.api import paged_attention as paged_attention
from paged_jax.ops.api import plan_attention as plan_attention
from paged_jax.ops.plan import AttentionPlan as AttentionPlan
from paged_jax.ops.write_kv import write_kv as write_kv


def __getattr__(name: str) -> Any:
  """Imports `paged_jax.nnx` and `paged_jax.linen`, and so flax, when asked."""
  if name in ("nnx", "linen"):
    return importlib.import_module(f"paged_jax.{name}")
  raise AttributeError(f"module 'paged_jax' has no attribute {name!r}")
