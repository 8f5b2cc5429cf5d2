"""A generation run observed: every step recorded, the pool's use accounted.

    waste = 1 - tokens written / tokens of room

Room is, for pages, the pages in use times p; for a contiguous cache, the batch
times the longest row it has to be ready for. Both at the fullest step.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from experiments.common import compiles, loading
from paged_jax.engine import generate, sampling
from paged_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One row's part in one step."""

  row: int
  positions: np.ndarray  # int [n], of the tokens fed
  slots: np.ndarray  # int [kinds, n]; two kinds, K and V, if combined
  pages: np.ndarray  # int [kinds, m], all pages of the row


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLog:
  """One step, on the host."""

  kind: str  # "prefill" or "decode"
  ms: float
  rows: tuple[Row, ...]  # those that took part
  pages_in_use: int
  live_tokens: int  # written, of all rows

  @property
  def num_tokens(self) -> int:
    return sum(row.positions.size for row in self.rows)

  def as_dict(self) -> dict[str, Any]:
    """Returns a JSON object."""
    rows = [
      {name: np.asarray(value).tolist() for name, value in vars(row).items()}
      for row in self.rows
    ]
    return vars(self) | dict(rows=rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """A run after its warm-up."""

  completions: list[generate.Completion]
  steps: list[StepLog]
  recompiled: int  # programs compiled after the warm-up
  compile_seconds: float  # of the warm-up
  cache_bytes: int
  num_pages: int  # P


def num_pages(
  lengths: Sequence[int], new_tokens: int, page_size: int, combined: bool
) -> int:
  """Returns the pages that the rows fill together, and not one more."""
  # The last token is never fed back.
  pages = sum(-(-(n + new_tokens - 1) // page_size) for n in lengths)
  return pages * (2 if combined else 1)


def make_generator(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  config: Mapping[str, Any],
) -> generate.Generator:
  """Checks a config and allocates the pool; compiles nothing yet.

  Args:
    model: the decoder.
    prompts: token ids, of a row at least.
    config: see configs/decode.py.

  Raises:
    ValueError: the config does not fit.
  """
  page_size = loading.positive("page_size", config["page_size"])
  new_tokens = loading.positive("max_new_tokens", config["max_new_tokens"])
  lengths = [len(prompt) for prompt in prompts]
  pages = config["num_pages"]
  if pages is None:
    pages = num_pages(lengths, new_tokens, page_size, config["combined"])
  least = num_pages([max(lengths)], new_tokens, page_size, config["combined"])
  if loading.positive("num_pages", pages) < least:
    raise ValueError(
      f"config.num_pages is {pages}: the longest row alone needs {least}"
    )
  return generate.Generator(
    model,
    num_pages=pages,
    page_size=page_size,
    num_sequences=len(prompts),
    max_pages=num_pages([max(lengths)], new_tokens, page_size, False),
    combined=config["combined"],
    prefill_tokens=config["prefill_tokens"],
    sampling=sampling.Sampling(
      temperature=config["temperature"],
      top_k=config["top_k"],
      top_p=config["top_p"],
    ),
    plan_options=config["plan_options"],
    implementation=config["implementation"],
  )


def run(
  generator: generate.Generator,
  prompts: Sequence[Sequence[int]],
  config: Mapping[str, Any],
  eos: Sequence[int] = (),
) -> Result:
  """Generates twice: first to compile, then observed.

  Args:
    generator: of `make_generator`.
    prompts: token ids.
    config: see configs/decode.py.
    eos: ids that end a text.

  Returns:
    What happened.

  Raises:
    RuntimeError: the pool has too few pages.
  """
  arguments = dict(
    max_new_tokens=config["max_new_tokens"],
    eos=eos,
    seed=config["seed"],
    permute_seed=config["seed"] if config["scatter"] else None,
  )
  with compiles.count() as warm_up:
    # All of it: a batch that shrinks can meet another size of prefill.
    generator.generate(prompts, on_step=observe, **arguments)
  steps = []
  with compiles.count() as after:
    completions = generator.generate(
      prompts, on_step=lambda record: steps.append(observe(record)), **arguments
    )
  return Result(
    completions=completions,
    steps=steps,
    recompiled=after.programs,
    compile_seconds=warm_up.seconds,
    cache_bytes=generator.cache_bytes,
    num_pages=generator.table.num_pages,
  )


def observe(record: generate.StepRecord) -> StepLog:
  """Copies what a report needs of a step to the host."""
  table, output = record.table, record.output
  B, M = table.num_sequences, table.max_pages
  pages = np.asarray(table.pages).reshape(B, -1, M)
  positions, slots = np.asarray(output.positions), np.asarray(output.slots)
  slots = slots.reshape(-1, positions.size)
  starts = np.cumsum(record.num_tokens) - record.num_tokens
  if record.kind == "decode":  # token b is row b's, even where others sit out
    starts = np.arange(B)
  rows = []
  for b in np.flatnonzero(np.asarray(output.ok)):
    mine = slice(starts[b], starts[b] + record.num_tokens[b])
    held = pages[b, :, pages[b, 0] != table.null].T
    rows.append(
      Row(row=int(b), positions=positions[mine], slots=slots[:, mine],
          pages=held)
    )
  return StepLog(
    kind=record.kind,
    ms=1e3 * record.seconds,
    rows=tuple(rows),
    pages_in_use=int((np.asarray(table.ref_counts) > 0).sum()),
    live_tokens=int(np.asarray(table.lengths).sum()),
  )


def summary(
  result: Result, prompts: Sequence[Sequence[int]], config: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the figures of a run: times in ms, rates in tokens/s."""
  steps = {
    kind: [step for step in result.steps if step.kind == kind]
    for kind in ("prefill", "decode")
  }
  figures: dict[str, Any] = {}
  for kind, logs in steps.items():
    ms = np.array([log.ms for log in logs])
    tokens = sum(log.num_tokens for log in logs)
    figures[f"{kind}_steps"] = len(logs)
    figures[f"{kind}_tokens"] = tokens
    # A run of one new token has no decode step at all.
    figures[f"{kind}_ms"] = float(ms.sum())
    figures[f"{kind}_tokens_per_s"] = (
      1e3 * tokens / float(ms.sum()) if tokens else None
    )
    if kind == "decode" and logs:
      median, p99 = np.percentile(ms, [50, 99])
      figures |= dict(ms_per_token=float(median), ms_per_token_p99=float(p99))
  peak = max(result.steps, key=lambda x: (x.pages_in_use, x.live_tokens))
  p, kinds = config["page_size"], 2 if config["combined"] else 1
  room = peak.pages_in_use // kinds * p
  longest = max(map(len, prompts)) + config["max_new_tokens"] - 1
  contiguous = len(prompts) * longest
  return figures | dict(
    num_pages=result.num_pages,
    pages_used=peak.pages_in_use,
    live_tokens=peak.live_tokens,
    paged_room=room,
    paged_waste=1 - peak.live_tokens / room,
    contiguous_room=contiguous,
    contiguous_waste=1 - peak.live_tokens / contiguous,
    pool_bytes=result.cache_bytes,
    compile_seconds=result.compile_seconds,
    recompiled=result.recompiled,
  )


def describe_step(number: int, step: StepLog) -> str:
  """Returns a line a row: its positions, slots and physical pages."""
  lines = [f"step {number} {step.kind} {step.ms:.1f} ms"]
  for row in step.rows:
    kinds = ("K ", "V ") if len(row.slots) == 2 else ("",)
    where = "; ".join(
      f"{kind}slots {spans(slots)}, {kind}pages {' '.join(map(str, pages))}"
      for kind, slots, pages in zip(kinds, row.slots, row.pages)
    )
    lines.append(f"  row {row.row}: positions {spans(row.positions)}; {where}")
  return "\n".join(lines)


def spans(numbers: np.ndarray) -> str:
  """Returns runs of neighbours as `first-last`: 0-15,32-36."""
  breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
  return ",".join(
    f"{run[0]}-{run[-1]}" if run.size > 1 else f"{run[0]}"
    for run in np.split(numbers, breaks)
  )


def describe(figures: Mapping[str, Any]) -> str:
  """Returns the last lines of a report."""
  f = figures
  lines = [
    f"prefill: {f['prefill_tokens']} tokens in {f['prefill_steps']} steps, "
    f"{f['prefill_ms']:.1f} ms, {f['prefill_tokens_per_s']:.0f} tokens/s"
  ]
  if f["decode_tokens"]:
    lines.append(
      f"decode: {f['decode_tokens']} tokens in {f['decode_steps']} steps, "
      f"{f['decode_tokens_per_s']:.0f} tokens/s, ms/token median "
      f"{f['ms_per_token']:.2f}, p99 {f['ms_per_token_p99']:.2f}"
    )
  lines.append(
    f"pool: {f['num_pages']} pages, {f['pool_bytes'] / 1e6:.1f} MB; at the "
    f"peak {f['pages_used']} in use for {f['live_tokens']} tokens"
  )
  lines.append(
    f"waste: pages {f['paged_waste']:.0%} of {f['paged_room']} tokens of "
    f"room, a contiguous cache {f['contiguous_waste']:.0%} of "
    f"{f['contiguous_room']}"
  )
  lines.append(
    f"compiled: {f['compile_seconds']:.1f} s in the warm-up, "
    f"{f['recompiled']} programs after it"
  )
  return "\n".join(lines)
