"""How the Hopper decode kernel is cut: a table of what was measured, a rule.

A CTA's tile is `tile` rows of keys: some pages of `kb` neighbouring kv heads
each (a bundle), which one copy a page brings in, since a page's heads lie next
to each other. A bundle's query rows share one 64-row matrix tile per computing
warpgroup:

    rows of one token   = kb * G, widened to whole groups of 8 rows of the
                          query [T * N, H], since copies start at such a group
    rows of a row block = block_tokens * token_rows <= 64 * consumers

Bundles cost little while the rows fit (a tile has 64 rows whatever is in them,
and computes with 32 of these or all) and save copies, page ids and segments;
but every split of a bundle writes all its rows, so a small batch, which is
split often, prefers small bundles.
"""

from collections.abc import Mapping
import dataclasses
import functools
from importlib import resources
import json
import math
from typing import Any

from paged_jax.ops.plan import Geometry

_SMEM_BYTES = 227 * 1024  # what a CTA may take on sm_90
_RESERVED = 4096  # barriers, what the driver takes
_SMS = 132  # H100; a guess is enough for the rule
_SM_BYTES = 23e3  # of K and V that an SM gets in a us when all are busy
_IN_FLIGHT = 64 * 1024  # bytes of K and V that an SM waits for, at least
_PACED = 16  # tiles of a share; in fewer nobody gets far ahead
_COPIES_AHEAD = 64  # of K, that L2 is asked for at first
_BYTES_AHEAD = 256 * 1024  # of K and V, likewise
PART_AHEAD = 16  # that part of a CTA's share, likewise
_SPLIT_US = 4.0  # what splitting segments may cost
_INVARIANT_B = 32  # the batch that a batch-invariant plan is made for
_INVARIANT_TOKENS = 256  # shortest piece of it

# Ways to cut the line of work, see hopper_plan.py.
EQUAL, FIXED, WHOLE = "equal", "fixed", "whole"


class TooFewRows(NotImplementedError):
  """No tile of this kernel fits the geometry; another kernel's does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Static shape of the decode kernel for one geometry."""

  tile: int  # rows of K (tokens times bundle heads) a step
  stages: int  # tiles of K and of V in flight, at most
  least: int  # likewise, of a CTA that is ahead of others (hopper_pace.py)
  ahead: int  # tiles that L2 is asked for at first, at most
  kb: int  # kv heads a bundle
  heads: int  # query heads a bundle, kb * G
  step: int  # positions that one copy, of a bundle of a page, brings
  page_size: int
  cut: str  # EQUAL, FIXED or WHOLE
  piece: int  # units of the shortest piece (FIXED)
  ctas_per_sm: int
  query_slots: int  # query tiles in flight
  consumers: int  # warpgroups that share the query rows, 64 each
  token_rows: int  # query rows of one token, a multiple of 8
  block_tokens: int  # query tokens a row block
  row_blocks: int  # row blocks a bundle
  bundles: int  # K / kb
  folds: bool  # whether a CTA adds up the pieces of a segment (FIXED) at once

  @property
  def rows(self) -> int:
    """Query rows of a segment."""
    return self.block_tokens * self.token_rows

  @property
  def packed(self) -> bool:
    """Whether a warp has 8 query rows and as much padding, not 16 rows.

    A thread's second row is padding then, of which it computes nothing.
    """
    return self.consumers == 1 and self.rows <= 32

  @property
  def warpgroup_rows(self) -> int:
    """Rows that a warpgroup computes with; some may be padding."""
    return 32 if self.packed else 64

  @property
  def paced(self) -> bool:
    """Whether CTAs are kept abreast of each other, see hopper_pace.py."""
    return self.least < self.stages

  @property
  def query_copies(self) -> int:
    """Copies of query rows, that a segment takes."""
    return self.rows // 8 if self.packed else self.block_tokens

  @property
  def tokens(self) -> int:
    """Positions of a tile."""
    return self.tile // self.kb

  @property
  def copies(self) -> int:
    """Copies that fill a tile of K, or of V."""
    return self.tokens // self.step

  @property
  def segments(self) -> int:
    """Independent pieces of work a sequence: bundles times row blocks."""
    return self.bundles * self.row_blocks


def check_geometry(geometry: Geometry) -> None:
  """Raises NotImplementedError for what no kernel of this backend does."""
  dtype, H, p = geometry.dtype, geometry.head_dim, geometry.page_size
  if dtype not in ("bfloat16", "float16"):
    raise NotImplementedError(f"dtype {dtype}: hopper does bf16 and f16")
  if H not in (64, 80, 96, 128, 192, 256):
    raise NotImplementedError(f"head dim H={H}: not 64, 80, 96, 128, 192, 256")
  if p > 256 or p & (p - 1):
    raise NotImplementedError(f"page size {p}: not a power of two up to 256")


def choose(
  geometry: Geometry,
  num_sequences: int,
  max_pages: int,
  *,
  decode: bool = True,
  batch_invariant: bool = False,
  overrides: Mapping[str, Any] | None = None,
) -> Config:
  """Returns the kernel's shape for a geometry, B and M; measured or by rule.

  Args:
    geometry: static facts of the call.
    num_sequences: B.
    max_pages: M.
    decode: whether every sequence has exactly one query token.
    batch_invariant: whether a sequence's result may depend on nothing else, so
      that B and M must not matter here.
    overrides: fields of Config, in place of what was measured.

  Raises:
    TooFewRows: pages of so few rows, or so many query rows, that no tile fits.
    NotImplementedError: the kernel cannot do this geometry.
  """
  g = geometry
  K, H, p = g.num_kv_heads, g.head_dim, g.page_size
  G, Q = g.num_heads // K, g.max_query_length
  check_geometry(g)
  if Q > 8:
    raise NotImplementedError(
      f"max_query_length={Q}: the hopper decode kernel does 1 to 8"
    )
  if G > 128:
    raise NotImplementedError(f"G={G} query heads a kv head: more than 128")
  B = _INVARIANT_B if batch_invariant else num_sequences
  positions = None if batch_invariant else B * max_pages * p
  given = measured(g, B) if overrides is None else overrides
  consumers = 2 if _token_rows(G) * Q > 64 and H <= 128 else 1
  tile, kb, step = _tile(g, B, positions, consumers, given)
  token_rows = _token_rows(kb * G)
  block_tokens = min(Q, 64 * consumers // token_rows)
  if not block_tokens:
    raise TooFewRows(f"G={G} with H={H}: too many rows for a tile")
  cut = FIXED
  if not batch_invariant:
    whole = decode and _whole(g, B * K // kb, kb, max_pages)
    cut = given.get("cut", WHOLE if whole else EQUAL)
  config = Config(
    tile=tile,
    stages=2,
    least=2,
    ahead=1,
    kb=kb,
    heads=kb * G,
    step=step,
    page_size=p,
    cut=cut,
    piece=max(_INVARIANT_TOKENS // step, 1),
    ctas_per_sm=given.get("ctas_per_sm", 1),
    query_slots=given.get("query_slots", 2 if H <= 128 else 1),
    consumers=consumers,
    token_rows=token_rows,
    block_tokens=block_tokens,
    row_blocks=-(-Q // block_tokens),
    bundles=K // kb,
    # Where registers hold two states.
    folds=cut == FIXED and H <= 128 and consumers == 1,
  )
  if positions is not None:
    positions = B * _longest(g, max_pages)
  return _with_depth(config, H, positions, given)


def _tile(g, B, positions, consumers, given):
  """Returns rows of a tile, heads of a bundle, positions of a copy.

  positions: of all sequences, at most; None: unknown.
  """
  K, H, p = g.num_kv_heads, g.head_dim, g.page_size
  # 64 rows of K and V are 32 KiB at H 128, two or three of which are in flight.
  short = H >= 128 or consumers == 2
  if positions is not None and K * positions <= _SMS * 128:
    short = True  # longer ones would never be full
  tile = given.get("tile", 64 if short else 128)
  kb = given.get("kb") or _bundle(g, tile, B)
  step = min(p, tile // kb)
  if tile % 64 or K % kb or (kb > 1 and step < p) or tile % (kb * step):
    raise ValueError(
      f"tile={tile}, kb={kb}: a tile takes a multiple of 64 rows, whole "
      f"bundles of pages of p={p}, and kb divides K={K}"
    )
  if kb * p < 8:
    raise TooFewRows(
      f"page size {p} with K={K} kv heads: a copy needs 8 rows, and no bundle "
      "of heads has them"
    )
  return tile, kb, step


def _with_depth(config, H, positions, given):
  """Returns the config with what is in flight, and asked of L2 at first."""
  room = _SMEM_BYTES // config.ctas_per_sm - _RESERVED - fixed_bytes(config, H)
  stage = 2 * config.tile * H * 2  # bytes
  least = given.get("least", max(_IN_FLIGHT // stage, 2))
  ahead = min(_COPIES_AHEAD // config.copies, _BYTES_AHEAD // stage)
  paced = config.cut != WHOLE  # else who has a long segment would be behind
  if positions is not None:
    share = positions * config.segments / _SMS  # tokens, at most
    ahead = min(ahead, math.ceil(share / (PART_AHEAD * config.tokens)))
    paced &= share >= _PACED * config.tokens
  stages = min(given.get("stages", least + paced), room // stage)
  return dataclasses.replace(
    config,
    stages=stages,
    least=min(least, stages) if paced else stages,
    ahead=given.get("ahead", max(ahead, 1)),
  )


@functools.cache
def _table() -> tuple[dict[str, Any], ...]:
  path = resources.files("paged_jax") / "data" / "hopper_decode.json"
  return tuple(json.loads(path.read_text())["rows"])


def table_key(geometry: Geometry, num_sequences: int) -> dict[str, Any]:
  """Returns the fields by which the table is looked up."""
  return dict(
    H=geometry.head_dim,
    G=geometry.num_heads // geometry.num_kv_heads,
    page_size=geometry.page_size,
    dtype=geometry.dtype,
    window=geometry.window is not None,
    # So few rows that most are split over many CTAs.
    few=num_sequences * geometry.num_kv_heads < _SMS // 2,
  )


def measured(geometry: Geometry, num_sequences: int) -> dict[str, Any]:
  """Returns the overrides that were measured for a geometry, or none.

  A bundle that does not suit K or the number of queries is not taken.
  """
  key = table_key(geometry, num_sequences)
  for row in _table():
    if all(row[name] == value for name, value in key.items()):
      kb = row["set"].get("kb", 1)
      rows = _token_rows(kb * key["G"]) * geometry.max_query_length
      if geometry.num_kv_heads % kb == 0 and rows <= 64:
        return row["set"]
  return {}


def num_ctas(config: Config, num_sequences: int, sms: int) -> int:
  """CTAs to launch: nearly as many as fit, cut where segments end if even.

  Equal lengths are the common case; a CTA whose share crosses from one segment
  into the next writes two results. Leaving a few multiprocessors idle costs
  less (3 us of 185), for the memory is the limit.
  """
  most = sms * config.ctas_per_sm
  if config.cut == WHOLE:
    return most
  segments = num_sequences * config.segments
  return max(
    range(most - most // 16, most + 1), key=lambda n: (math.gcd(n, segments), n)
  )


def fixed_bytes(config: Config, head_dim: int) -> int:
  """Shared memory besides the stages, bytes."""
  return 64 * config.consumers * config.query_slots * head_dim * 2


def _whole(g, segments, kb, max_pages):
  """Whether CTAs take whole segments, so that none is split.

  Only where the longest possible segment is short: what does not divide evenly
  must cost less than waiting for parts and adding them up.
  """
  us = _longest(g, max_pages) * kb * g.head_dim * 4 / _SM_BYTES
  return us <= 12 and (-(-segments // _SMS) - segments / _SMS) * us <= _SPLIT_US


def _longest(g, max_pages):
  """Positions of a sequence that are read, in whole pages, at most."""
  pages = max_pages
  if g.window is not None:
    seen = g.window + g.max_query_length - 1  # from anywhere in a page on
    pages = min(pages, 1 + -(-(seen - 1) // g.page_size))
  return pages * g.page_size


def _bundle(g, rows, num_sequences):
  """The largest power of two that fits, within what the batch can use."""
  K, G, p = g.num_kv_heads, g.num_heads // g.num_kv_heads, g.page_size
  best = kb = 1
  while K % (2 * kb) == 0 and 2 * kb * p <= rows:
    kb *= 2
    # A copy needs 8 rows. Beyond that keep some segments: one that many CTAs
    # share has many parts of all its rows.
    must = best * p < 8
    query_rows = _token_rows(kb * G)
    if not must:
      query_rows *= g.max_query_length
    if query_rows > 64:
      break
    if must or num_sequences * (K // kb) >= _SMS // 2:
      best = kb
  return best


def _token_rows(heads):
  """Rows that hold `heads` query rows from any start; see `Config`."""
  most = max(start * heads % 8 + heads for start in range(8))
  return -(-most // 8) * 8
