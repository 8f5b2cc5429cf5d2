"""Public paged-attention shapes by id, and how a run overrides them."""

import dataclasses
import difflib
import functools
from importlib import resources
import json
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One decode step: B sequences, one query token each, a paged KV cache.

  Attributes:
    id: name of the case; runs of one case are told apart by `@context`.
    origin: where the shape was published.
    size: "cpu" when two CPU cores can run it, else "gpu".
    query_heads: N.
    kv_heads: K, a divisor of N.
    head_dim: H.
    block: tokens of a page, which is also the block of the task graph.
    table_width: M, page table entries a sequence.
    lengths: [B] tokens each sequence attends to.
    dtype: of queries, keys, values and rounded probabilities.
    atol: absolute tolerance of an output element.
    rtol: relative tolerance of an output element.
    tasks: the published task count, None when none was published.
    out_elements: the published output size, None when none was published.
  """

  id: str
  origin: str
  size: str
  query_heads: int
  kv_heads: int
  head_dim: int
  block: int
  table_width: int
  lengths: tuple[int, ...]
  dtype: str
  atol: float
  rtol: float
  tasks: int | None = None
  out_elements: int | None = None

  def __post_init__(self):
    for name in ("query_heads", "kv_heads", "head_dim", "block"):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f"query_heads={self.query_heads} is not a multiple of "
        f"kv_heads={self.kv_heads}: every KV head serves the same number of "
        "query heads"
      )
    if not self.lengths:
      raise ValueError("batch must be at least 1, got 0")
    if min(self.lengths) < 0:
      raise ValueError(
        f"context must not be negative, got {min(self.lengths)}"
      )
    if self.dtype not in DTYPES:
      raise ValueError(
        f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
        + did_you_mean(self.dtype, DTYPES)
      )
    widest = max(self.pages_per_sequence)
    if widest > self.table_width:
      raise ValueError(
        f"table_width={self.table_width} is too narrow for {widest} pages "
        f"({max(self.lengths)} tokens in blocks of {self.block})"
      )

  @property
  def batch(self) -> int:
    return len(self.lengths)

  @property
  def pages_per_sequence(self) -> tuple[int, ...]:
    return tuple(-(-length // self.block) for length in self.lengths)

  @property
  def expected_tasks(self) -> int:
    """4 * sum(ceil(context / block)): the serial graph has exactly these."""
    return 4 * sum(self.pages_per_sequence)

  @property
  def expected_edges(self) -> int:
    """sum(4 n - 1) over the sequences of n > 0 blocks, serial graph."""
    return sum(4 * n - 1 for n in self.pages_per_sequence if n)


def did_you_mean(word: str, known) -> str:
  """Returns `; did you mean "x"?` for the nearest known word, or nothing."""
  near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f'; did you mean "{near[0]}"?' if near else ""


@functools.cache
def public_cases() -> dict[str, dict[str, Any]]:
  """Returns every public case by id, as `data/public_cases.json` has it."""
  path = resources.files("paged_jax") / "data" / "public_cases.json"
  return json.loads(path.read_text())["cases"]


def simulated_ids(size: str | None = None) -> tuple[str, ...]:
  """Returns the ids of decode cases, optionally of one size only."""
  return tuple(
    name
    for name, entry in public_cases().items()
    if entry["phase"] == "decode" and size in (None, entry["size"])
  )


def select(text: str) -> tuple[str, ...]:
  """Resolves a comma-separated list of case ids and the words all, cpu, gpu.

  Args:
    text: for example "sim-readme,sim-case1" or "cpu,sim-prod1".

  Returns:
    Case ids in the order given, each once.

  Raises:
    ValueError: an unknown id (with the nearest known one) or a prefill case.
  """
  groups = {
    "all": simulated_ids(),
    "cpu": simulated_ids("cpu"),
    "gpu": simulated_ids("gpu"),
  }
  chosen: dict[str, None] = {}
  for word in filter(None, (part.strip() for part in text.split(","))):
    if word in groups:
      chosen.update(dict.fromkeys(groups[word]))
    elif word in simulated_ids():
      chosen[word] = None
    elif word in public_cases():
      raise ValueError(
        f'case "{word}" is a prefill; the task graph is one decode step'
      )
    else:
      known = (*groups, *simulated_ids())
      raise ValueError(
        f'unknown case "{word}"'
        + (did_you_mean(word, known) or f"; known: {', '.join(known)}")
      )
  if not chosen:
    raise ValueError("no case given: name an id, or all, cpu or gpu")
  return tuple(chosen)


def runs(
  case_id: str,
  *,
  batch: int | None = None,
  query_heads: int | None = None,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  block: int | None = None,
  context: tuple[int, ...] | None = None,
  dtype: str | None = None,
) -> tuple[Case, ...]:
  """Returns the runs of a public case, with what is not None overridden.

  A case is one run, unless it asks for one run a context or for decode steps
  (step i attends to context + 1 + i tokens). An overridden case drops the
  published counts, which no longer apply, and widens its table as needed.

  Args:
    case_id: key of `public_cases`.
    batch: B, at least 1.
    query_heads: N, a multiple of kv_heads.
    kv_heads: K.
    head_dim: H.
    block: tokens a block and page, at least 1.
    context: tokens, tiled over the batch.
    dtype: one of `DTYPES`.

  Returns:
    One `Case` a run.

  Raises:
    ValueError: an override out of range.
  """
  entry = public_cases()[case_id]
  changes = (batch, query_heads, kv_heads, head_dim, block, context, dtype)
  untouched = all(change is None for change in changes)

  def pick(change, published):
    return published if change is None else change

  batch = pick(batch, entry["batch"])
  block = pick(block, entry["page_size"])
  if batch < 1:
    raise ValueError(f"batch must be at least 1, got {batch}")
  if block < 1:
    raise ValueError(f"block must be at least 1, got {block}")
  if context is not None:
    contexts = [tuple(context)]
  elif steps := entry.get("decode_steps"):
    contexts = [
      tuple(prompt + 1 + step for prompt in entry["contexts"])
      for step in range(steps)
    ]
  elif entry.get("run_each_context"):
    contexts = [(one,) for one in entry["contexts"]]
  else:
    contexts = [tuple(entry["contexts"])]
  if not all(contexts):
    raise ValueError("context must name at least one length, got none")

  result = []
  for tokens in contexts:
    lengths = tuple(tokens[i % len(tokens)] for i in range(batch))
    pages = max(-(-length // block) for length in lengths)
    result.append(
      Case(
        id=f"{case_id}@{tokens[0]}" if len(contexts) > 1 else case_id,
        origin=entry["origin"],
        size=entry["size"],
        query_heads=pick(query_heads, entry["query_heads"]),
        kv_heads=pick(kv_heads, entry["kv_heads"]),
        head_dim=pick(head_dim, entry["head_dim"]),
        block=block,
        table_width=(
          entry["table_width"]
          if untouched
          else max(entry["table_width"], pages)
        ),
        lengths=lengths,
        dtype=pick(dtype, entry["dtype"]),
        atol=entry["atol"],
        rtol=entry["rtol"],
        tasks=entry.get("tasks") if untouched else None,
        out_elements=entry.get("out_elements") if untouched else None,
      )
    )
  return tuple(result)
