"""Batched generation: prefill in chunks, then decode, until EOS or the limit.

    pending prompts --chunks of T tokens--> prefill --> active rows
    active rows     --one token a row-----> decode  --> done: pages released

Rows that find no free page wait until others finish. Where all wait, the last
row gives up its pages, and starts again from its tokens when a row is done. The
host decides who takes part; everything else happens in the compiled steps.
"""

from collections.abc import Callable, Collection, Sequence
import dataclasses
import functools
import itertools
import reprlib
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.cache import page_table as page_table_lib
from paged_jax.cache import permute as permute_lib
from paged_jax.cache import pool as pool_lib
from paged_jax.cache.page_table import PageTable
from paged_jax.engine import sampling as sampling_lib
from paged_jax.engine import steps
from paged_jax.models.transformer import Transformer
from paged_jax.ops import implementations
from paged_jax.ops import inputs as inputs_lib
from paged_jax.ops import plan as plan_lib

_LEAST_BUCKET = 16  # packed tokens of the smallest prefill program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What was generated for one prompt."""

  tokens: tuple[int, ...]  # the prompt not included, EOS included
  finished_by: str  # "eos" or "length"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
  """One step as `on_step` sees it."""

  kind: str  # "prefill" or "decode"
  num_tokens: np.ndarray  # int [B], tokens fed a row
  tokens: np.ndarray  # int [T], the tokens fed, packed (decode: one a row)
  output: steps.StepOutput  # new tokens, ok, positions, slots
  table: PageTable  # after the step
  seconds: float  # wall time, the wait for the result included


class Generator:
  """A model, its page pool, and the compiled steps over them.

  The pool is allocated once and handed from step to step.
  """

  def __init__(
    self,
    model: Transformer,
    *,
    num_pages: int,
    page_size: int,
    num_sequences: int,
    max_pages: int,
    combined: bool = False,
    prefill_tokens: int = 512,
    sampling: sampling_lib.Sampling | None = None,
    plan_options: Sequence[str] = (),
    implementation: str | None = None,
    interpret: bool | None = None,
  ):
    """Allocates the pool; compiles nothing yet.

    Args:
      model: the decoder.
      num_pages: P, pages of the pool.
      page_size: p, tokens a page.
      num_sequences: B, rows of the batch.
      max_pages: M, the most pages a row can have.
      combined: whether K and V get different pages of one pool.
      prefill_tokens: most packed tokens of one prefill step; longer prompts go
        in chunks.
      sampling: how tokens are drawn; None: greedily.
      plan_options: those of `plan_attention` that every step's plan has, such
        as "memory_order".
      implementation: as in `paged_attention`.
      interpret: as in `paged_attention`.

    Raises:
      ValueError: a size is not a positive int, or a name is unknown.
    """
    inputs_lib.check_int("prefill_tokens", prefill_tokens, 1)
    if implementation is not None:
      implementations.load(implementation)  # is there such a one?
    config = model.config
    self.config = config
    self.prefill_tokens = prefill_tokens
    self._table = page_table_lib.create_page_table(
      num_pages=num_pages,
      page_size=page_size,
      num_sequences=num_sequences,
      max_pages=max_pages,
      combined=combined,
    )
    self._cache = pool_lib.create_cache(
      num_layers=config.num_layers,
      num_pages=num_pages,
      num_kv_heads=config.num_kv_heads,
      page_size=page_size,
      head_dim=config.head_dim,
      dtype=config.dtype,
      combined=combined,
    )
    graph, self._weights = nnx.split(model)
    options = steps.StepOptions(
      sampling=sampling or sampling_lib.Sampling(),
      plan_options=plan_lib.check_options(plan_options),
      implementation=implementation,
      interpret=interpret,
    )
    jit = lambda f: jax.jit(
      functools.partial(f, graph=graph, options=options),
      donate_argnames="cache",
    )
    self.prefill, self.decode = jit(steps.prefill), jit(steps.decode)
    self._reserve = jax.jit(page_table_lib.reserve)
    self._release = jax.jit(page_table_lib.release)

  @property
  def table(self) -> PageTable:
    return self._table

  @property
  def cache_bytes(self) -> int:
    return self._cache.num_bytes

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    seed: int = 0,
    permute_seed: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
  ) -> list[Completion]:
    """Continues every prompt.

    Args:
      prompts: token ids, one sequence a prompt, at most B of them.
      max_new_tokens: most tokens to add to each.
      eos: ids that end a sequence.
      seed: of the sampling.
      permute_seed: None, or reserve all pages beforehand and rename them by a
        random permutation, so that neighbours in a sequence are strangers in
        the pool.
      on_step: called after every step.

    Returns:
      One completion a prompt.

    Raises:
      ValueError: a prompt is empty, too long, or holds an unknown id.
      RuntimeError: the pool has too few pages for one row alone.
    """
    B = self._table.num_sequences
    self._check(prompts, max_new_tokens, eos)
    if permute_seed is not None:
      self._scatter_pages(prompts, max_new_tokens, permute_seed)
    pending = {b: np.asarray(p, np.int32) for b, p in enumerate(prompts)}
    fed = np.zeros(B, np.int32)  # the last token of each active row
    active = np.zeros(B, bool)
    evicted = {}  # rows that gave up their pages, and their tokens
    texts = [[] for _ in prompts]
    reasons = [""] * len(prompts)
    keys = (
      jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count()
    )
    try:
      while pending or active.any():
        progress = False
        if pending:
          progress, rows, new = self._prefill(pending, next(keys), on_step)
        if not progress:
          progress, rows, new = self._decode(active, fed, next(keys), on_step)
        if not progress:
          last = self._evict()
          pending.pop(last, None)
          evicted[last] = np.array([*prompts[last], *texts[last]], np.int32)
          active[last] = False
          continue
        done = np.zeros(B, bool)
        for b in rows:
          texts[b].append(int(new[b]))
          fed[b], active[b] = new[b], True
          if new[b] in eos:
            reasons[b], done[b] = "eos", True
          elif len(texts[b]) == max_new_tokens:
            reasons[b], done[b] = "length", True
        if done.any():
          active &= ~done
          self._table = self._release(self._table, jnp.asarray(done))
          pending.update(sorted(evicted.items()))
          evicted.clear()
    finally:
      everything = jnp.ones(B, bool)
      self._table = self._release(self._table, everything)
    return [
      Completion(tokens=tuple(text), finished_by=reason)
      for text, reason in zip(texts, reasons)
    ]

  def _prefill(self, pending, key, on_step):
    """One chunk; returns (progress, rows that ended prefill, new tokens)."""
    num_tokens = np.zeros(self._table.num_sequences, np.int32)
    left = self.prefill_tokens
    for b, prompt in pending.items():
      num_tokens[b] = min(len(prompt), left)
      left -= num_tokens[b]
    packed = np.concatenate([p[: num_tokens[b]] for b, p in pending.items()])
    tokens = np.zeros(self._bucket(len(packed)), np.int32)
    tokens[: len(packed)] = packed
    output = self._run(
      "prefill", self.prefill, tokens, num_tokens, num_tokens, key, on_step
    )
    ok, new = jax.device_get((output.ok, output.next_tokens))
    ended = []
    for b in np.flatnonzero(ok):
      pending[b] = pending[b][num_tokens[b] :]
      if not pending[b].size:
        del pending[b]
        ended.append(b)
    return ok.any(), ended, new

  def _decode(self, active, fed, key, on_step):
    """One token a row; returns (progress, rows served, new tokens)."""
    if not active.any():
      return False, (), fed
    ones = active.astype(np.int32)
    output = self._run("decode", self.decode, fed, active, ones, key, on_step)
    ok, new = jax.device_get((output.ok, output.next_tokens))
    return ok.any(), np.flatnonzero(ok), new

  def _evict(self):
    """Takes the pages of the last row that has any; returns the row."""
    owners = np.flatnonzero(self._table.lengths)
    if len(owners) < 2:
      raise RuntimeError(
        f"num_pages is {self._table.num_pages}: a row needs more than all of "
        "them; make the pool larger or the prompt shorter"
      )
    rows = np.arange(self._table.num_sequences) == owners[-1]
    self._table = self._release(self._table, jnp.asarray(rows))
    return int(owners[-1])

  def _run(self, kind, function, tokens, rows, num_tokens, key, on_step):
    start = time.perf_counter()
    self._cache, self._table, output = function(
      self._weights,
      self._cache,
      self._table,
      jnp.asarray(tokens),
      jnp.asarray(rows),
      key,
    )
    if on_step is not None:
      jax.block_until_ready(output)
      on_step(
        StepRecord(
          kind=kind,
          num_tokens=num_tokens.copy(),
          tokens=tokens.copy(),
          output=output,
          table=self._table,
          seconds=time.perf_counter() - start,
        )
      )
    return output

  def _bucket(self, num_tokens):
    """Few static sizes: the next power of two, at most prefill_tokens."""
    bucket = max(_LEAST_BUCKET, 1 << (num_tokens - 1).bit_length())
    return min(bucket, self.prefill_tokens)

  def _scatter_pages(self, prompts, max_new_tokens, seed):
    need = np.zeros(self._table.num_sequences, np.int32)
    # The last token is never fed back, so it needs no slot.
    need[: len(prompts)] = [len(p) + max_new_tokens - 1 for p in prompts]
    table, ok = self._reserve(self._table, jnp.asarray(need))
    if not ok.all():
      raise RuntimeError(
        f"num_pages is {table.num_pages}: too few to reserve all pages "
        "beforehand, as permute_seed asks; make the pool larger"
      )
    order = np.random.default_rng(seed).permutation(table.num_pages)
    self._table = permute_lib.permute_table(table, jnp.asarray(order))

  def _check(self, prompts, max_new_tokens, eos):
    B = self._table.num_sequences
    if not 0 < len(prompts) <= B:
      raise ValueError(
        f"prompts has {len(prompts)} entries: pass 1 to B={B} of them"
      )
    inputs_lib.check_int("max_new_tokens", max_new_tokens, 1)
    if not isinstance(eos, Collection) or isinstance(eos, str):
      raise ValueError(f"eos is {eos!r}: pass a sequence of token ids")
    capacity = self._table.max_pages * self._table.page_size
    for i, prompt in enumerate(prompts):
      ids = np.asarray(prompt)
      kind = ids.dtype if ids.size else int
      if ids.ndim != 1 or not np.issubdtype(kind, np.integer):
        raise ValueError(
          f"prompts[{i}] is {reprlib.repr(prompt)}: pass token ids, as a "
          "tokenizer gives"
        )
      if not 0 < len(prompt) <= capacity - max_new_tokens + 1:
        raise ValueError(
          f"prompts[{i}] has {len(prompt)} tokens: it needs at least one, and "
          f"with {max_new_tokens} new ones must fit the {capacity} tokens of "
          "a row; raise max_pages or shorten it"
        )
      if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
        raise ValueError(
          f"prompts[{i}] holds ids {min(prompt)}..{max(prompt)}: the model "
          f"knows 0..{self.config.vocab_size - 1}"
        )
