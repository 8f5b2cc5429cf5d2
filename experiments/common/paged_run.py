"""The paged path's run, over tables made as awkward as they come.

    plain      pages in the order they are handed out
    permuted   pages renamed at random, before the prefill and again after it
    shared     row 0 reads what all prompts begin with; the others fork it and
               copy the page they write into
    combined   K and V in different pages of one pool

shared and combined tables are permuted too; names add up: "shared+combined".
The pool starts as NaN. So does every slot end that no token was written to: a
lost write, a write astray and a read of a dead slot all show.
"""

from collections.abc import Sequence
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from experiments.common import faults, loading
from experiments.common.standard_run import Run
from paged_jax.cache import fork, permute
from paged_jax.cache import page_table as page_table_lib
from paged_jax.cache import pool as pool_lib
from paged_jax.cache.page_table import PageTable
from paged_jax.models import step as step_lib
from paged_jax.models.transformer import Transformer

_KINDS = ("plain", "permuted", "shared", "combined")
_SPARE = 3  # pages that nobody needs
_SPARE_COLUMNS = 2  # of the table: nulls to step over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
  """What kind of table."""

  name: str

  def __post_init__(self):
    for word in self.words:
      loading.one_of("tables", word, _KINDS)

  @property
  def words(self) -> list[str]:
    return self.name.split("+")

  @property
  def permuted(self) -> bool:
    return self.words != ["plain"]

  @property
  def shared(self) -> bool:
    return "shared" in self.words

  @property
  def combined(self) -> bool:
    return "combined" in self.words


@dataclasses.dataclass(kw_only=True)
class PagedModel:
  """A model taken apart, and what is wrong with its paged path."""

  model: dataclasses.InitVar[Transformer]
  fault: str | None = None
  implementation: str | None = None

  def __post_init__(self, model: Transformer):
    self.config = model.config
    self.graph, self.weights = nnx.split(model)


@functools.partial(jax.jit, donate_argnames="cache")
def _rename(table, cache, order):
  return (
    permute.permute_table(table, order),
    permute.permute_cache(cache, order),
  )


_reserve = jax.jit(page_table_lib.reserve)
_fork = jax.jit(fork.fork)


# Faults in the cache leave the program alone: it is compiled once for all.
@functools.partial(
  jax.jit,
  static_argnames=("graph", "attend", "decode", "implementation"),
  donate_argnames="cache",
)
def _feed(
  weights, cache, table, tokens, num_tokens, *, graph, attend, decode,
  implementation,
):
  """One step with copy-on-write; returns logits and all that was done."""
  model = nnx.merge(graph, weights)
  table, reserved = page_table_lib.reserve(table, num_tokens)
  table, sources, targets, copied = fork.copy_on_write(table, num_tokens)
  pages = sources.ravel(), targets.ravel()
  cache = jax.tree.map(lambda pool: fork.copy_pages(pool, *pages), cache)
  attention = model.config.attention
  if decode:
    table, step, ok = step_lib.decode_step(
      table, num_tokens > 0, attention, implementation=implementation
    )
  else:
    table, step, ok = step_lib.prefill_step(
      table,
      num_tokens,
      attention,
      total=tokens.shape[0],
      implementation=implementation,
    )
  logits, cache = model(tokens, cache, step, attend=attend)
  return cache, table, logits, step.slots, pages, reserved & copied & ok


@dataclasses.dataclass(kw_only=True)
class _State:
  """Device state, and on the host which slots may hold something."""

  paged: PagedModel
  table: PageTable
  cache: pool_lib.Cache
  written: Bool[np.ndarray, "P p"]
  rng: np.random.Generator
  problem: str = ""

  def feed(self, tokens, num_tokens, decode=False) -> np.ndarray:
    """Runs a step; returns its logits."""
    self.cache, self.table, logits, slots, copies, ok = _feed(
      self.paged.weights,
      self.cache,
      self.table,
      np.asarray(tokens, np.int32),
      np.asarray(num_tokens, np.int32),
      graph=self.paged.graph,
      attend=faults.attend_with(self.paged.fault),
      implementation=self.paged.implementation,
      decode=decode,
    )
    P = self.table.num_pages
    for source, target in zip(*map(np.asarray, copies)):
      if target < P:
        self.written[target] = self.written[source]
    slots = np.asarray(slots).ravel()
    self.written.reshape(-1)[slots[slots < self.written.size]] = True
    if not np.asarray(ok).all():
      self.problem = self.problem or "a row got no page"
    return np.asarray(logits)

  def rename(self) -> None:
    """Moves every page somewhere else."""
    order = self.rng.permutation(self.table.num_pages)
    self.table, self.cache = _rename(
      self.table, self.cache, order.astype(np.int32)
    )
    moved = np.empty_like(self.written)
    moved[order] = self.written
    self.written = moved

  def slots(self, b: int) -> Int[np.ndarray, "kinds n"]:
    """Returns the slots of a row's tokens, of K and V."""
    p = self.table.page_size
    pages = np.asarray(self.table.pages[b]).reshape(-1, self.table.max_pages)
    pages = np.broadcast_to(pages, (2, pages.shape[1]))
    position = np.arange(int(self.table.lengths[b]))
    return pages[:, position // p] * p + position % p


def run(
  paged: PagedModel,
  prompts: Sequence[Sequence[int]],
  fed: Int[np.ndarray, "D B"],
  tables: Tables,
  *,
  page_size: int,
  shared_tokens: int,
  seed: int,
) -> tuple[Run, Bool[np.ndarray, "R"]]:
  """Runs prompts and decode steps through pages.

  Args:
    paged: the compiled model.
    prompts: token ids, B of them.
    fed: the token of each decode step and row.
    tables: what kind.
    page_size: p, tokens.
    shared_tokens: tokens that all prompts begin with; each has more.
    seed: of the page order.

  Returns:
    (run, computed): of the R prompt tokens, row after row, those that were
    computed; the others were shared.
  """
  B, num_steps = len(prompts), len(fed)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  state = _create(paged, lengths + num_steps, page_size, tables, seed)
  shared = shared_tokens if tables.shared else 0
  first = np.where(np.arange(B) == 0, shared, 0) if shared else lengths
  if tables.permuted:
    state.table, _ = _reserve(state.table, first.astype(np.int32))
    state.rename()
  total = int(lengths.sum())
  vocab = paged.config.vocab_size
  logits = [np.zeros((n, vocab), np.float32) for n in lengths]
  computed = [np.zeros(n, bool) for n in lengths]

  def prefill(starts, counts):
    parts = [p[s : s + n] for p, s, n in zip(prompts, starts, counts)]
    packed = np.zeros(total, np.int32)
    packed[: counts.sum()] = np.concatenate(parts)
    out, at = state.feed(packed, counts), 0
    for b, (start, count) in enumerate(zip(starts, counts)):
      logits[b][start : start + count] = out[at : at + count]
      computed[b][start : start + count] = True
      at += count

  starts = np.zeros(B, np.int32)
  prefill(starts, first)
  if shared:
    parents = np.where(np.arange(B) == 0, B, 0).astype(np.int32)
    state.table, _ = _fork(state.table, parents)
    state.rename()
    starts = np.full(B, shared, np.int32)
    prefill(starts, lengths - shared)
  if tables.permuted:
    state.rename()
  token = state.slots(0)[:, -1]
  state.cache = faults.tamper(state.cache, paged.fault, tuple(token.tolist()))
  ones = np.ones(B, np.int32)
  steps = [state.feed(tokens, ones, decode=True) for tokens in fed]
  k, v = _contents(state, B)
  return Run(
    prefill=np.concatenate(logits),
    decode=np.stack(steps),
    k=k,
    v=v,
    problem=state.problem or _astray(state),
  ), np.concatenate(computed)


def _create(paged, lengths, page_size, tables, seed) -> _State:
  pages = -(-lengths // page_size)
  kinds = 2 if tables.combined else 1
  table = page_table_lib.create_page_table(
    num_pages=int(pages.sum()) * kinds + _SPARE,
    page_size=page_size,
    num_sequences=len(lengths),
    max_pages=int(pages.max()) + _SPARE_COLUMNS,
    combined=tables.combined,
  )
  config = paged.config
  cache = pool_lib.create_cache(
    num_layers=config.num_layers,
    num_pages=table.num_pages,
    num_kv_heads=config.num_kv_heads,
    page_size=page_size,
    head_dim=config.head_dim,
    dtype=config.dtype,
    combined=tables.combined,
  )
  return _State(
    paged=paged,
    table=table,
    cache=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache),
    written=np.zeros((table.num_pages, page_size), bool),
    rng=np.random.default_rng(seed),
  )


def _contents(
  state: _State, B: int
) -> list[Float[np.ndarray, "L S K H"]]:
  """Returns K and V of all rows' tokens, read through the table."""
  cache, p = state.cache, state.table.page_size
  pools = [cache.k_pages, cache.k_pages if cache.v_pages is None
           else cache.v_pages]
  slots = np.concatenate([state.slots(b) for b in range(B)], axis=1)
  found = []
  for pool, where in zip(pools, slots):
    host = np.asarray(pool.astype(jnp.float32)).swapaxes(2, 3)
    found.append(host[:, where // p, where % p])
  return found


def _astray(state: _State) -> str:
  """Returns what is wrong with the slots that nothing was written to."""
  for pool in jax.tree.leaves(state.cache):
    host = np.asarray(pool.astype(jnp.float32)).swapaxes(2, 3)
    changed = ~np.isnan(host).all(axis=(0, 3, 4)) & ~state.written
    if changed.any():
      page, offset = map(int, np.argwhere(changed)[0])
      return (
        f"{int(changed.sum())} slots were written that hold no token, the "
        f"first at page {page}, offset {offset}"
      )
  return ""
