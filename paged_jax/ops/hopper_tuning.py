"""How the Hopper decode kernel is cut: a table of what was measured, a rule.

A CTA's tile is `tile` rows of keys: some pages of `kb` neighbouring kv heads
each (a bundle), which one copy a page brings in, since a page's heads lie next
to each other. A bundle's query rows share one 64-row matrix tile per consumer
warpgroup:

    rows of one token   = kb * G, widened to whole groups of 8 rows of the
                          query [T * N, H], since copies start at such a group
    rows of a row block = block_tokens * token_rows <= 64 * consumers

Bundles cost nothing while the rows fit (the tile has 64 rows whatever is in
them) and save copies, page ids and segments; but every split of a bundle writes
all its rows, so a small batch, which is split often, prefers small bundles.
"""

import dataclasses
import math

from paged_jax.ops.plan import Geometry

_SMEM_BYTES = 227 * 1024  # what a CTA may take on sm_90
_RESERVED = 4096  # barriers, reduction scratch, what the driver takes
_SMS = 132  # H100; a guess is enough for the rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Static shape of the decode kernel for one geometry."""

  tile: int  # rows of K (tokens times bundle heads) a step
  stages: int  # tiles of K and of V in flight
  kb: int  # kv heads a bundle
  heads: int  # query heads a bundle, kb * G
  step: int  # positions that one copy, of a bundle of a page, brings
  ctas_per_sm: int
  query_slots: int  # query tiles in flight
  consumers: int  # warpgroups that share the query rows, 64 each
  splits: int  # warpgroups that share the rows of a tile
  token_rows: int  # query rows of one token, a multiple of 8
  block_tokens: int  # query tokens a row block
  row_blocks: int  # row blocks a bundle
  bundles: int  # K / kb
  columns: int  # columns of a float32 partial staged in shared memory at once
  staging: int  # buffers for that
  merged: int  # neighbouring heads that a merging CTA does

  @property
  def rows(self) -> int:
    """Query rows of a partial result."""
    return self.block_tokens * self.token_rows

  @property
  def warpgroups(self) -> int:
    """Warpgroups that compute; one of the two factors is 1."""
    return self.consumers * self.splits

  @property
  def tokens(self) -> int:
    """Positions of a tile."""
    return self.tile // self.kb

  @property
  def copies(self) -> int:
    """Copies that fill a tile of K, or of V."""
    return self.tokens // self.step

  @property
  def part(self) -> int:
    """Rows of a tile that one warpgroup computes with."""
    return self.tile // self.splits

  @property
  def segments(self) -> int:
    """Independent pieces of work a sequence: bundles times row blocks."""
    return self.bundles * self.row_blocks


# (H, G, p, itemsize) -> overrides of the rule, as measured (see BUILD.md).
TABLE: dict[tuple[int, int, int, int], dict[str, int]] = {}


def choose(
  geometry: Geometry, num_sequences: int, max_pages: int, **overrides: int
) -> Config:
  """Returns the kernel's shape for a geometry, B and M; measured or by rule.

  Raises:
    NotImplementedError: the kernel cannot do this geometry.
  """
  g = geometry
  K, H, p = g.num_kv_heads, g.head_dim, g.page_size
  G = g.num_heads // K
  Q = g.max_query_length
  if g.dtype not in ("bfloat16", "float16"):
    raise NotImplementedError(f"dtype {g.dtype}: hopper does bf16 and f16")
  if H not in (64, 80, 96, 128, 192, 256):
    raise NotImplementedError(f"head dim H={H}: not 64, 80, 96, 128, 192, 256")
  if Q > 8:
    raise NotImplementedError(
      f"max_query_length={Q}: the hopper decode kernel does 1 to 8"
    )
  if p > 256 or p & (p - 1):
    raise NotImplementedError(f"page size {p}: not a power of two up to 256")
  if G > 128:
    raise NotImplementedError(f"G={G} query heads a kv head: more than 128")
  given = dict(TABLE.get((H, G, p, 2), {}), **overrides)
  two = _token_rows(G) * Q > 64 and H <= 128
  consumers = given.get("consumers", 2 if two else 1)
  splits = given.get("splits", 1 if H > 128 or consumers == 2 else 2)
  tile = given.get("tile", 64 * splits)
  kb = given.get("kb") or _bundle(g, tile // splits, num_sequences)
  if tile % (64 * splits) or (kb > 1 and kb * p > tile // splits) or K % kb:
    raise ValueError(
      f"tile={tile}, splits={splits}, kb={kb}: a warpgroup takes 64 rows or a "
      f"multiple, whole bundles of pages of p={p}, and kb divides K={K}"
    )
  if kb * p < 8:
    raise NotImplementedError(
      f"page size {p} with K={K} kv heads: a copy needs 8 rows, and no bundle "
      "of heads has them"
    )
  if kb * G < given.get("merged", merged_heads(H)):
    raise NotImplementedError(
      f"H={H} with {kb * G} query heads a bundle: rows are merged "
      f"{merged_heads(H)} heads at a time"
    )
  token_rows = _token_rows(kb * G)
  block_tokens = min(Q, 64 * consumers // token_rows)
  if not block_tokens:
    raise NotImplementedError(f"G={G} with H={H}: too many rows for a tile")
  config = Config(
    tile=tile,
    stages=2,
    kb=kb,
    heads=kb * G,
    step=min(p, tile // kb),
    ctas_per_sm=given.get("ctas_per_sm", 1),
    query_slots=given.get("query_slots", 2 if H <= 128 else 1),
    consumers=consumers,
    splits=splits,
    token_rows=token_rows,
    block_tokens=block_tokens,
    row_blocks=-(-Q // block_tokens),
    bundles=K // kb,
    columns=given.get("columns", 32 if H % 32 == 0 else 16),
    staging=given.get("staging", 1),
    merged=given.get("merged", merged_heads(H)),
  )
  room = _SMEM_BYTES // config.ctas_per_sm - _RESERVED - fixed_bytes(config, H)
  stages = given.get("stages", min(8, room // (2 * tile * H * 2)))
  return dataclasses.replace(config, stages=stages)


def fixed_bytes(config: Config, head_dim: int) -> int:
  """Shared memory besides the stages, bytes."""
  query = config.query_slots * 64 * config.consumers * head_dim * 2
  staged = config.staging * config.columns + 1  # output, log-sum-exp
  return query + 64 * config.warpgroups * staged * 4


def merged_heads(head_dim: int) -> int:
  """Fewest heads a merging CTA does: their rows fill 128 lanes."""
  return 128 // math.gcd(128, head_dim)


def _bundle(g, rows, num_sequences):
  """The largest power of two that fits, within what the batch can use."""
  K, G, p = g.num_kv_heads, g.num_heads // g.num_kv_heads, g.page_size
  merged = merged_heads(g.head_dim)
  best = kb = 1
  while K % (2 * kb) == 0 and 2 * kb * p <= rows:
    kb *= 2
    if _token_rows(kb * G) * g.max_query_length > 64:
      break
    # A copy needs 8 rows; merging, whole groups of heads. Beyond that keep some
    # segments: one that many CTAs share writes many partials of all its rows.
    needed = best * p < 8 or best * G % merged
    if needed or num_sequences * (K // kb) >= _SMS // 2:
      best = kb
  return best


def _token_rows(heads):
  """Rows that hold `heads` query rows from any start; see `Config`."""
  most = max(start * heads % 8 + heads for start in range(8))
  return -(-most // 8) * 8
