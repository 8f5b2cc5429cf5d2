"""What every implementation of paged attention must do.

An implementation's test file is one subclass:

    class TestXla(suite.AttentionConformance):
      implementation = "xla"

A subclass may narrow `head_dims`, `page_sizes`, `group_sizes`, `dtypes` or
`max_query` to what its implementation promises, and nothing else.
"""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from tests.conformance import data

RAGGED = (0, 1, 7, 8, 9, 40)  # 0, 1, p-1, p, p+1, M*p for p = 8, M = 5
DTYPES = ("float32", "bfloat16", "float16")


class AttentionConformance:
  """Inherited by the test class of every implementation."""

  implementation: str
  head_dims = (64, 80, 96, 128, 256)
  page_sizes = (1, 8, 16, 32, 64, 128, 256)
  group_sizes = (1, 2, 3, 4, 5, 7, 8, 16)
  dtypes = DTYPES
  max_query = None  # the most query tokens a sequence; None: any number
  # Sizes of the shared small problem.
  base = types.MappingProxyType(dict(N=4, K=2, H=32, p=8))

  # --- helpers -----------------------------------------------------------

  def call(self, made, **more):
    return data.call(made, self.implementation, **more)

  def check(self, made, **more):
    out, lse = self.call(made, **more)
    data.assert_right(made, out, lse)
    return out, lse

  def problem(self, seed=0, **changes):
    settings = dict(self.base, dtype=self.dtypes[0], lengths=RAGGED)
    return data.problem(seed, **(settings | changes))

  def prefill(self, seed=0, **changes):
    if self.max_query is not None:
      settings = dict(
        query_lengths=(1, 0, self.max_query, 2, 1),
        lengths=(9, 5, 17, 2, 0),
        max_query_length=self.max_query,
      )
    else:
      settings = dict(query_lengths=(5, 0, 17, 33, 1),
                      lengths=(5, 9, 23, 33, 19))
    return self.problem(seed, **(settings | changes))

  # --- shapes ------------------------------------------------------------

  @pytest.mark.parametrize("dtype", DTYPES)
  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  def test_ragged_lengths(self, phase, dtype):
    self._needs(dtype, self.dtypes)
    make = self.problem if phase == "decode" else self.prefill
    made = make(1, dtype=dtype)
    out, lse = self.check(made)
    if phase == "decode":
      assert not np.asarray(out[0]).any() and np.isneginf(lse[0]).all()

  @pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 7, 8, 16])
  def test_group_sizes(self, G):
    self._needs(G, self.group_sizes)
    self.check(self.problem(2, N=2 * G, K=2, lengths=(3, 21)))

  @pytest.mark.parametrize("G", [3, 7])
  def test_group_sizes_in_prefill(self, G):
    self._needs(G, self.group_sizes)
    self.check(self.prefill(3, N=2 * G, K=2))

  def test_multi_query(self):
    self.check(self.problem(4, N=8, K=1, lengths=(3, 21)))

  @pytest.mark.parametrize("H", [64, 80, 96, 128, 256])
  def test_head_dims(self, H):
    self._needs(H, self.head_dims)
    self.check(self.problem(5, H=H, lengths=(3, 21)))

  @pytest.mark.parametrize("p", [1, 8, 16, 32, 64, 128, 256])
  def test_page_sizes(self, p):
    self._needs(p, self.page_sizes)
    lengths = (1, max(p - 1, 1), p, p + 1, 2 * p + p // 2 + 1)
    self.check(self.problem(6, p=p, lengths=lengths))

  @pytest.mark.parametrize("p", [1, 16, 128])
  def test_page_sizes_in_prefill(self, p):
    self._needs(p, self.page_sizes)
    self.check(self.prefill(7, p=p))

  # --- dead slots and pages ----------------------------------------------

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  def test_dead_slots_change_no_bit(self, phase):
    clean = (self.problem if phase == "decode" else self.prefill)(8)
    want = self.call(clean.poisoned(0.0))
    for poison in (np.nan, np.inf, -np.inf, 3e38):
      data.assert_same_bits(self.call(clean.poisoned(poison)), want)

  def test_table_entries_past_the_length_change_no_bit(self):
    made = self.problem(9)
    want = self.call(made)
    table = np.asarray(made.page_table)
    used = -(-np.asarray(made.lengths) // self.base["p"])
    past = np.arange(table.shape[1]) >= used[:, None]
    for entry in (0, 2, -1, 2**31 - 1):
      changed = jnp.asarray(np.where(past, np.int32(entry), table))
      got = self.call(made.replace(page_table=changed))
      data.assert_same_bits(got, want)

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  def test_moving_pages_changes_no_bit(self, phase):
    made = (self.problem if phase == "decode" else self.prefill)(10)
    data.assert_same_bits(self.call(made.moved()), self.call(made))

  def test_sharing_a_page_equals_copying_it(self):
    made = self.problem(11, lengths=(24, 24), P=9)
    table = np.array(made.page_table)
    k, v = np.array(made.k_pages), np.array(made.v_pages)
    for column in range(2):  # rows 0 and 1 get the same first two pages
      k[table[1, column]] = k[table[0, column]]
      v[table[1, column]] = v[table[0, column]]
    copied = made.replace(k_pages=jnp.asarray(k), v_pages=jnp.asarray(v))
    table[1, :2] = table[0, :2]
    shared = copied.replace(page_table=jnp.asarray(table))
    data.assert_same_bits(self.call(shared), self.call(copied))

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  @pytest.mark.parametrize("one_pool", [False, True])
  def test_combined_tables(self, phase, one_pool):
    make = self.problem if phase == "decode" else self.prefill
    self.check(make(12, combined=True, one_pool=one_pool))

  def test_layers_of_a_stacked_pool_in_a_scan(self):
    made = self.problem(13, L=3)

    def step(_, layer):
      return None, self.call(made, jit=False, layer=layer)

    _, (out, lse) = jax.jit(
      lambda: jax.lax.scan(step, None, jnp.arange(3, dtype=jnp.int32))
    )()
    for layer in range(3):
      one = made.replace(
        k_pages=made.k_pages[layer], v_pages=made.v_pages[layer]
      )
      data.assert_right(one, out[layer], lse[layer])

  # --- masks -------------------------------------------------------------

  def test_rows_without_queries_and_tokens_beyond_the_last_row(self):
    made = self.prefill(14)
    T = made.query.shape[0] + 6
    padded = made.replace(
      query=jnp.pad(made.query, ((0, 6), (0, 0), (0, 0)),
                    constant_values=jnp.nan)
    )
    out, lse = self.call(padded)
    assert not np.asarray(out[T - 6 :]).any()
    assert np.isneginf(lse[T - 6 :]).all()
    data.assert_right(made, out[: T - 6], lse[: T - 6])

  def test_more_queries_than_keys(self):
    self.check(self._with_few_keys(15))

  def test_more_queries_than_keys_without_causal(self):
    self.check(self._with_few_keys(35, causal=False))

  def test_without_causal(self):
    self.check(self.prefill(16, causal=False))

  def test_later_tokens_change_no_earlier_bit(self):
    if self.max_query is not None:
      made = self.problem(17, lengths=(19,), query_lengths=(self.max_query,),
                          max_query_length=self.max_query)
      cut, rows = 19 - 1, self.max_query - 1
    else:
      made = self.problem(17, lengths=(33,), query_lengths=(33,))
      cut = rows = 20
    changed = self._with_row(made, 0, cut, 100.0)
    got, want = self.call(changed), self.call(made)
    assert (np.asarray(got[0][rows]) != np.asarray(want[0][rows])).any()
    data.assert_same_bits(
      [x[:rows] for x in got], [x[:rows] for x in want]
    )

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  @pytest.mark.parametrize("window", [1, 11])
  def test_window(self, phase, window):
    make = self.problem if phase == "decode" else self.prefill
    self.check(make(18, window=window))

  def test_slots_before_the_window_change_no_bit(self):
    made = self.problem(19, lengths=(37, 21), window=10)
    want = self.call(made)
    for row, length in ((0, 37), (1, 21)):
      for position in range(length - 10):
        made = self._with_row(made, row, position, np.inf)
    data.assert_same_bits(self.call(made), want)

  # --- softmax -----------------------------------------------------------

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  def test_soft_cap(self, phase):
    make = self.problem if phase == "decode" else self.prefill
    self.check(make(20, soft_cap=1.5, scale=0.7))

  @pytest.mark.parametrize("phase", ["decode", "prefill"])
  def test_sinks(self, phase):
    make = self.problem if phase == "decode" else self.prefill
    made = make(21, sinks=True)
    _, lse = self.check(made)
    if phase == "decode":  # row 0 has length 0: its LSE is the sink
      np.testing.assert_allclose(lse[0], made.sinks, rtol=1e-6)

  def test_everything_at_once(self):
    self.check(self.prefill(22, window=13, soft_cap=5.0, sinks=True,
                            combined=True, scale=0.3))

  def test_one_valid_key_returns_its_value(self):
    made = self.problem(23, lengths=(1, 1, 1))
    out, _ = self.call(made)
    for b in range(3):
      value = np.asarray(made.v_pages)[int(made.page_table[b, 0]), :, 0]
      want = np.repeat(value, 2, axis=0)  # G = 2 query heads a kv head
      np.testing.assert_array_equal(np.asarray(out[b]), want)

  @pytest.mark.parametrize("size", [4e6, 6e4, 2e4])
  def test_extreme_logits_have_one_winner(self, size):
    p, lengths = self.base["p"], (33,)
    made = self.problem(24, lengths=lengths, scale=1.0)
    dtype = made.query.dtype
    if size > float(jnp.finfo(dtype).max):
      pytest.skip(f"{size} is not a {dtype}")
    query = jnp.zeros_like(made.query).at[..., 0].set(1)
    k, table = np.array(made.k_pages), np.asarray(made.page_table)
    for position in range(33):
      at = (table[0, position // p], slice(None), position % p)
      k[at] = 0
      k[at][:, 0] = size if position == 20 else -size
    out, lse = self.call(made.replace(query=query, k_pages=jnp.asarray(k)))
    winner = np.asarray(made.v_pages)[table[0, 20 // p], :, 20 % p]
    np.testing.assert_array_equal(
      np.asarray(out[0]), np.repeat(winner, 2, axis=0)
    )
    top = float(jnp.asarray(size, dtype))
    np.testing.assert_allclose(np.asarray(lse[0]), top, rtol=1e-6)

  def test_lse_merges_two_halves(self):
    whole = self.problem(25, lengths=(40, 24))
    p = self.base["p"]
    table = np.asarray(whole.page_table)
    P = whole.k_pages.shape[0]
    null = np.full_like(table, P)
    left = whole.replace(lengths=jnp.array([2 * p, 2 * p], jnp.int32))
    right_table = np.concatenate([table[:, 2:], null[:, :2]], axis=1)
    right = whole.replace(
      page_table=jnp.asarray(right_table),
      lengths=jnp.array([40 - 2 * p, 24 - 2 * p], jnp.int32),
    )
    (a, x), (b, y) = self.call(left), self.call(right)
    lse = np.logaddexp(x, y)
    merged = (np.exp(x - lse)[..., None] * np.asarray(a, np.float32)
              + np.exp(y - lse)[..., None] * np.asarray(b, np.float32))
    want, want_lse = data.expected(whole)
    tight = dict(rtol=1e-4, atol=1e-5)
    if self.dtypes[0] != "float32":
      tight = dict(rtol=2e-2, atol=1e-2)
    np.testing.assert_allclose(merged, want, **tight)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-4)

  def test_chunks_and_single_tokens_agree_with_one_shot(self):
    if self.max_query is not None:
      pytest.skip("one shot is longer than this implementation's queries")
    made = self.problem(26, lengths=(21,), query_lengths=(21,))
    self.check(made)
    for chunk in (8, 1):
      for first in range(0, 21, chunk):
        last = min(first + chunk, 21)
        rows = jnp.pad(made.query[first:last],
                       ((0, chunk - (last - first)), (0, 0), (0, 0)))
        part = made.replace(
          query=rows,
          lengths=jnp.array([last], jnp.int32),
          query_starts=jnp.array([0, last - first], jnp.int32),
        )
        out, lse = self.call(part)
        n = last - first
        data.assert_right(part.replace(query=rows[:n]), out[:n], lse[:n])

  # --- transformations ---------------------------------------------------

  def test_with_and_without_jit(self):
    made = self.problem(27)
    for a, b in zip(self.call(made), self.call(made, jit=False), strict=True):
      np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6,
        atol=1e-6,
      )

  def test_vmap_over_queries(self):
    made = self.problem(28)
    queries = jnp.stack([made.query, made.query[::-1], -made.query])
    out, lse = jax.jit(
      jax.vmap(
        lambda q: self.call(made.replace(query=q), jit=False)
      )
    )(queries)
    for i in range(3):
      one = made.replace(query=queries[i])
      data.assert_right(one, out[i], lse[i])

  def test_new_contents_do_not_recompile(self):
    problems = [
      self.problem(29, lengths=(3, 17, 0), M=3, P=9),
      self.problem(30, lengths=(24, 1, 9), M=3, P=9),
    ]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(arrays):
      return self.call(
        data.Problem(**arrays, static=problems[0].static), jit=False
      )

    for made in problems:
      fields = dataclasses.asdict(made)
      fields.pop("static")
      out, lse = run(fields)
      data.assert_right(made, out, lse)

  def test_repetitions_are_bitwise_equal(self):
    made = self.prefill(31)
    want = self.call(made)
    for _ in range(3):
      data.assert_same_bits(self.call(made), want)

  def test_a_plan_changes_nothing(self):
    made = self.problem(32)
    K, p, H = made.k_pages.shape[1:]
    plan = paged_jax.plan_attention(
      made.page_table,
      made.lengths,
      num_heads=made.query.shape[1],
      num_kv_heads=K,
      head_dim=H,
      page_size=p,
      dtype=made.query.dtype,
      implementation=self.implementation,
    )
    out, lse = self.call(made, plan=plan)
    data.assert_right(made, out, lse)

  # --- details -----------------------------------------------------------

  def _with_few_keys(self, seed, **changes):
    # Row 2 has more query tokens than keys: the first ones see nothing.
    few = (5, 9, 3, 33, 1) if self.max_query is None else (1, 5, 2, 1, 0)
    return self.prefill(seed, lengths=few, **changes)

  def _needs(self, value, promised):
    if value not in promised:
      pytest.skip(f"{self.implementation} promises {promised}, not {value}")

  def _with_row(self, made, row, position, value):
    """Sets the K and V rows of one position of a sequence to `value`."""
    p = self.base["p"]
    page = int(np.asarray(made.page_table)[row, position // p])
    return made.replace(
      k_pages=made.k_pages.at[page, :, position % p].set(value),
      v_pages=made.v_pages.at[page, :, position % p].set(value),
    )
