"""The shape of one attention call, and what it must move and compute.

Bytes count every K and V element that some query sees once, plus the query,
the output and the page table. FLOPs count two per multiply-add of the pairs
(query, key) that the mask lets through, so a causal prefill counts half a
square. Both are the least any kernel can do, whatever it does.
"""

import dataclasses
import functools
from importlib import resources
import json
from typing import Any

from jaxtyping import Int
import ml_dtypes
import numpy as np

PHASES = ("decode", "prefill", "mixed", "shared", "write")
DTYPES = ("float32", "bfloat16", "float16")
DISTRIBUTIONS = ("const", "ragged", "uniform", "lognormal", "one_long")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """One attention call: B sequences over a paged cache.

  Attributes:
    name: what tables and reports call it.
    phase: "decode", "prefill" (whole prompts and chunks of them), "mixed" (both
      in one call), "shared" (decode of rows that begin alike) or "write" (the
      new tokens are written to the pool, nothing is attended).
    batch: B, sequences.
    num_heads: N, query heads.
    num_kv_heads: K, a divisor of N.
    head_dim: H.
    page_size: p, tokens a page.
    context: tokens of the longest sequence, the new ones included.
    distribution: of the lengths: "const" = all of them `context`, "ragged" =
      U[context / 2, context], "uniform" = U[1, context], "lognormal" = median
      context / 8, sigma 1, clipped; "one_long" = one of `context`, the others
      context / 64.
    query_tokens: new tokens a sequence; 0 = all of them (a whole prompt).
    runs: (rows, tokens, new tokens) of rows that are alike, in place of
      `distribution` and `query_tokens`.
    shared_prefix: tokens that all rows begin with, in the same pages.
    window: sliding window in tokens, or None.
    soft_cap: cap of the logits, or None.
    sinks: whether every head has a sink logit.
    dtype: of query and pool.
    seed: of the lengths.
  """

  name: str
  phase: str
  batch: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  page_size: int
  context: int
  distribution: str = "const"
  query_tokens: int = 1
  runs: tuple[tuple[int, int, int], ...] = ()
  shared_prefix: int = 0
  window: int | None = None
  soft_cap: float | None = None
  sinks: bool = False
  dtype: str = "bfloat16"
  seed: int = 0

  def __post_init__(self):
    for name in (
      "batch", "num_heads", "num_kv_heads", "head_dim", "page_size", "context"
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass an int of at least 1")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads is {self.num_heads}, not a multiple of num_kv_heads "
        f"{self.num_kv_heads}: every kv head serves the same number of heads"
      )
    for name, known in (
      ("phase", PHASES), ("dtype", DTYPES), ("distribution", DISTRIBUTIONS)
    ):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"{name} is {value!r}: pass one of {', '.join(known)}"
        )

    rows = sum(count for count, *_ in self.runs)
    longest = max((tokens for _, tokens, _ in self.runs), default=0)
    if self.runs and (rows, longest) != (self.batch, self.context):
      raise ValueError(
        f"runs hold {rows} rows of up to {longest} tokens but batch is "
        f"{self.batch} and context {self.context}: both must agree"
      )
    prefix = self.shared_prefix
    if prefix and (
      prefix % self.page_size or self.window or prefix > min(self.lengths)
    ):
      raise ValueError(
        f"shared_prefix is {prefix}: pass whole pages of {self.page_size}, no "
        f"more than the shortest row's {min(self.lengths)}, and no window"
      )

  @property
  def decode(self) -> bool:
    """Whether every row has one new token, so that T == B."""
    return not self.runs and self.query_tokens == 1

  @property
  def lengths_in_words(self) -> str:
    if self.runs:
      return " + ".join(f"{n} x {new} of {all_}" for n, all_, new in self.runs)
    if self.shared_prefix:
      return f"{self.distribution}, the first {self.shared_prefix} shared"
    return self.distribution

  @property
  def group_size(self) -> int:  # G = N / K
    return self.num_heads // self.num_kv_heads

  @functools.cached_property
  def lengths(self) -> Int[np.ndarray, "B"]:
    rng = np.random.default_rng(self.seed)
    c, b = self.context, self.batch
    if self.runs:
      lengths = np.repeat(*np.array(self.runs).T[1::-1])
    elif self.distribution == "const":
      lengths = np.full(b, c)
    elif self.distribution == "ragged":
      lengths = rng.integers(max(c // 2, 1), c, b, endpoint=True)
    elif self.distribution == "uniform":
      lengths = rng.integers(1, c, b, endpoint=True)
    elif self.distribution == "lognormal":
      lengths = np.clip(rng.lognormal(np.log(c / 8), 1, b), 1, c)
    else:
      lengths = np.full(b, max(c // 64, 1))
      lengths[0] = c
    return lengths.astype(np.int32)

  @functools.cached_property
  def query_lengths(self) -> Int[np.ndarray, "B"]:
    if self.runs:
      counts, _, new = np.array(self.runs, np.int32).T
      return np.repeat(new, counts)
    if not self.query_tokens:
      return self.lengths
    return np.minimum(self.lengths, self.query_tokens).astype(np.int32)

  @property
  def query_starts(self) -> Int[np.ndarray, "B+1"]:
    return np.concatenate([[0], self.query_lengths.cumsum()]).astype(np.int32)

  @property
  def num_tokens(self) -> int:  # T
    return int(self.query_lengths.sum())

  @property
  def num_kv_tokens(self) -> int:
    return int(self.lengths.sum())

  @property
  def pages(self) -> Int[np.ndarray, "B"]:
    """Pages a sequence owns."""
    return -(-self.lengths // self.page_size)

  @property
  def max_pages(self) -> int:  # M
    return -(-self.context // self.page_size)

  @property
  def itemsize(self) -> int:  # bytes
    return 4 if self.dtype == "float32" else 2

  @property
  def kv_bytes(self) -> int:
    """Bytes of the K and V tokens that some query sees."""
    seen = self.lengths.astype(np.int64)
    if self.window is not None:
      seen = np.minimum(seen, self.window + self.query_lengths - 1)
    row = 2 * self.num_kv_heads * self.head_dim * self.itemsize
    return (int(seen.sum()) - (self.batch - 1) * self.shared_prefix) * row

  @property
  def bytes(self) -> int:
    """The least bytes a kernel can move: K, V, query, output, page table.

    A writer reads the new rows of K and V, and writes them.
    """
    if self.phase == "write":
      row = 2 * self.num_kv_heads * self.head_dim * self.itemsize
      return 2 * self.num_tokens * row
    query = self.num_tokens * self.num_heads * self.head_dim * self.itemsize
    return self.kv_bytes + 2 * query + 4 * int(self.pages.sum())

  @property
  def flops(self) -> int:
    """4 H a pair: two for q . k, two for the weighted sum of v."""
    if self.phase == "write":
      return 0
    length, new = self.lengths.astype(np.int64), self.query_lengths
    if self.window is None:
      pairs = new * length - new * (new - 1) // 2
    else:  # token j sees min(length - new + j + 1, window) keys
      pairs = np.array([
        np.minimum(np.arange(a - b + 1, a + 1), self.window).sum()
        for a, b in zip(length, new)
      ])
    return 4 * self.num_heads * self.head_dim * int(pairs.sum())

  @property
  def waste(self) -> float:
    """Fraction of the owned slots that hold no token, 0..1."""
    return 1 - self.num_kv_tokens / float(self.pages.sum() * self.page_size)


def numpy_dtype(name: str) -> np.dtype:
  """Returns the NumPy dtype of "float32", "bfloat16" or "float16"."""
  return np.dtype(getattr(ml_dtypes, name, name))


@functools.cache
def stored() -> dict[str, Any]:
  """Returns `data/bench_shapes.json`: named shapes and their peers' times."""
  path = resources.files("paged_jax") / "data" / "bench_shapes.json"
  return json.loads(path.read_text())


def named() -> dict[str, Shape]:
  """Returns the stored shapes by name."""
  fields = {field.name for field in dataclasses.fields(Shape)}
  found = {}
  for name, row in stored()["shapes"].items():
    values = {k: v for k, v in row.items() if k in fields}
    values["runs"] = tuple(map(tuple, row.get("runs", ())))
    found[name] = Shape(name=name, **values)
  return found
