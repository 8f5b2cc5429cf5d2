"""Fresh random problems: permuted tables, odd lengths, poisoned dead slots."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from tests.conformance import oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Arguments of one paged_attention call, and how to change them."""

  query: Any
  k_pages: Any
  v_pages: Any
  page_table: Any
  lengths: Any
  query_starts: Any = None
  sinks: Any = None
  static: dict = dataclasses.field(default_factory=dict)

  def replace(self, **changes) -> "Problem":
    return dataclasses.replace(self, **changes)

  @property
  def arrays(self):
    return (
      self.query,
      self.k_pages,
      self.v_pages,
      self.page_table,
      self.lengths,
      self.query_starts,
      self.sinks,
    )

  def live_slots(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns bool [P, p] for K and for V: the slots some row owns."""
    P, p = self.k_pages.shape[-4], self.k_pages.shape[-2]
    tables = np.asarray(self.page_table)
    if tables.ndim == 2:
      tables = np.stack([tables, tables], axis=1)
    live = np.zeros((2, P, p), bool)
    for b, length in enumerate(np.asarray(self.lengths)):
      for kind in range(2):
        for position in range(int(length)):
          live[kind, tables[b, kind, position // p], position % p] = True
    if self.v_pages is None:
      live[:] = live.any(0)
    return live[0], live[1]

  def moved(self) -> "Problem":
    """The same problem with every page elsewhere in the pool."""
    P = self.k_pages.shape[0]
    to = np.random.default_rng(0).permutation(P)
    entries = np.append(to, P).astype(np.int32)
    return self.replace(
      k_pages=jnp.zeros_like(self.k_pages).at[to].set(self.k_pages),
      v_pages=jnp.zeros_like(self.v_pages).at[to].set(self.v_pages),
      page_table=jnp.asarray(entries[np.asarray(self.page_table)]),
    )

  def poisoned(self, value: float) -> "Problem":
    """The same problem with `value` in every dead slot."""
    k_live, v_live = self.live_slots()

    def fill(pool, live):
      if pool is None:
        return None
      value_in = jnp.array(value, pool.dtype)
      return jnp.where(live[:, None, :, None], pool, value_in)

    return self.replace(
      k_pages=fill(self.k_pages, k_live), v_pages=fill(self.v_pages, v_live)
    )


def problem(
  seed: int = 0,
  *,
  lengths: tuple[int, ...],
  query_lengths: tuple[int, ...] | None = None,
  N: int = 4,
  K: int = 2,
  H: int = 32,
  p: int = 8,
  M: int | None = None,
  P: int | None = None,
  L: int | None = None,
  T: int | None = None,
  dtype: Any = jnp.float32,
  combined: bool = False,
  one_pool: bool = False,
  sinks: bool = False,
  **static: Any,
) -> Problem:
  """Draws a problem: unit-variance data, a permuted table, null tails.

  The pool holds fewer pages than B * M wherever the lengths allow it; the
  dead slots are poisoned with NaN.
  """
  rng = np.random.default_rng(seed)
  B = len(lengths)
  M = M or max(1, -(-max(lengths) // p))
  kinds = 2 if combined else 1
  need = kinds * sum(-(-n // p) for n in lengths)
  P = P or need + 3
  order = iter(rng.permutation(P))
  table = np.full((B, kinds, M), P, np.int32)
  for b, length in enumerate(lengths):
    for column in range(-(-length // p)):
      table[b, :, column] = [next(order) for _ in range(kinds)]
  table = table if combined else table[:, 0]
  starts = None
  tokens = B
  if query_lengths is not None:
    starts = np.cumsum([0, *query_lengths]).astype(np.int32)
    tokens = int(starts[-1]) if T is None else T

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  layers = () if L is None else (L,)
  made = Problem(
    query=normal(tokens, N, H),
    k_pages=normal(*layers, P, K, p, H),
    v_pages=None if one_pool else normal(*layers, P, K, p, H),
    page_table=jnp.asarray(table),
    lengths=jnp.asarray(lengths, jnp.int32),
    query_starts=None if starts is None else jnp.asarray(starts),
    sinks=jnp.asarray(rng.standard_normal(N), jnp.float32) if sinks else None,
    static=static,
  )
  return made.poisoned(float("nan"))


def plan_arguments(made: Problem) -> dict[str, Any]:
  """Returns what `plan_attention` is to be told of a problem."""
  most = made.static.get("max_query_length", made.query.shape[0])
  return dict(
    num_heads=made.query.shape[-2],
    num_kv_heads=made.k_pages.shape[-3],
    head_dim=made.query.shape[-1],
    page_size=made.k_pages.shape[-2],
    dtype=made.query.dtype,
    max_query_length=1 if made.query_starts is None else most,
    causal=made.static.get("causal", True),
    window=made.static.get("window"),
  )


def call(
  made: Problem,
  implementation: str,
  *,
  jit: bool = True,
  plan: Any = None,
  layer: Any = None,
  **static: Any,
):
  """Runs `implementation`; returns (out, lse) as jax arrays."""
  static = dict(made.static, implementation=implementation, **static)
  run = _attention(tuple(sorted(static.items())))
  return (jax.jit(run) if jit else run)(made.arrays, plan, layer)


@functools.cache  # one function object for equal statics: jit compiles once
def _attention(static):
  def run(arrays, plan, layer):
    query, k_pages, v_pages, page_table, lengths, query_starts, sinks = arrays
    return paged_jax.paged_attention(
      query,
      k_pages,
      v_pages,
      page_table,
      lengths,
      query_starts=query_starts,
      sinks=sinks,
      plan=plan,
      layer=layer,
      return_lse=True,
      **dict(static),
    )

  return run


def expected(made: Problem, **more):
  """Returns the oracle's (out, lse), float64."""
  query, k_pages, v_pages, table, lengths, starts, sinks = (
    None if x is None else np.asarray(x) for x in made.arrays
  )
  static = {k: v for k, v in made.static.items() if k != "max_query_length"}
  return oracle.attend(
    query,
    k_pages,
    v_pages,
    table,
    lengths,
    query_starts=starts,
    sinks=sinks,
    **static,
    **more,
  )


def assert_right(made: Problem, out, lse) -> None:
  """Holds (out, lse) to the error rule of their dtype against the oracle."""
  want, want_lse = expected(made)
  assert out.shape == want.shape and out.dtype == made.query.dtype
  assert lse.shape == want_lse.shape and lse.dtype == jnp.float32
  got = np.asarray(out).astype(np.float64)
  assert np.isfinite(got).all(), "the output holds NaN or Inf"
  error = np.abs(got - want)
  lse = np.asarray(lse, np.float64)
  assert (np.isneginf(lse) == np.isneginf(want_lse)).all()
  lse_error = np.abs(np.where(np.isneginf(lse), 0, lse)
                     - np.where(np.isneginf(want_lse), 0, want_lse))
  assert not np.isnan(lse).any()
  assert (lse_error <= 1e-5 + 1e-5 * np.abs(want_lse, where=np.isfinite(
    want_lse), out=np.zeros_like(want_lse))).all(), lse_error.max()
  if out.dtype == jnp.float32:
    excess = error - (2e-6 + 1e-5 * np.abs(want))
    assert (excess <= 0).all(), f"float32 error {error.max():.2e}"
    return
  naive, _ = expected(made, round_to=made.query.dtype)
  allowed = np.abs(naive.astype(np.float64) - want)
  assert error.max() <= 2 * allowed.max() + 1e-5, (error.max(), allowed.max())
  assert error.mean() <= 1.5 * allowed.mean() + 1e-9, (
    error.mean(),
    allowed.mean(),
  )


def assert_same_bits(a, b) -> None:
  for x, y in zip(a, b, strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.shape == y.shape
    assert x.tobytes() == y.tobytes(), "outputs differ in some bit"
