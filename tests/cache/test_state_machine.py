"""Random histories of a page table against the plain-Python model."""

import functools

from hypothesis import settings, stateful
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from tests.cache import model

P, p, B, M = 9, 4, 4, 4
TOTAL = 24

reserve = jax.jit(paged_jax.reserve)
slot_mapping = jax.jit(paged_jax.slot_mapping, static_argnums=2)
advance = jax.jit(paged_jax.advance)
release = jax.jit(paged_jax.release)
fork = jax.jit(paged_jax.fork)
copy_on_write = jax.jit(paged_jax.copy_on_write)

counts = st.lists(
  st.one_of(st.integers(0, 6), st.sampled_from([-1, M * p, 2**31 - 1])),
  min_size=B,
  max_size=B,
)
few = st.lists(st.integers(0, 6), min_size=B, max_size=B)


def i32(values):
  return jnp.asarray(values, jnp.int32)


class PageTableMachine(stateful.RuleBasedStateMachine):
  """Every rule runs on both; every step compares and checks the invariants."""

  combined = False

  def __init__(self):
    super().__init__()
    self.table = paged_jax.create_page_table(
      num_pages=P,
      page_size=p,
      num_sequences=B,
      max_pages=M,
      combined=self.combined,
    )
    self.model = model.ModelTable(P, p, B, M, self.combined)

  @stateful.initialize(length=st.integers(1, 2 * p))
  def start_with_a_shared_row(self, length):
    # Sharing is rare in random histories: begin with it.
    self.reserve([length, 0, 0, 0])
    self.step([length, 0, 0, 0])
    self.fork([B, 0, B, B])

  @stateful.rule(num_tokens=counts)
  def reserve(self, num_tokens):
    before = self.table
    self.table, ok = reserve(before, i32(num_tokens))
    assert self.model.reserve(num_tokens) == ok.tolist()
    for b in np.flatnonzero(~np.asarray(ok)):
      assert (before.pages[b] == self.table.pages[b]).all()

  @stateful.rule(num_tokens=few)
  def step(self, num_tokens):
    slots = slot_mapping(self.table, i32(num_tokens), TOTAL)
    want = [self.model.slots(num_tokens, TOTAL, kind) for kind in range(2)]
    want = want if self.combined else want[0]
    assert slots.tolist() == want
    self.table = advance(self.table, i32(num_tokens))
    self.model.advance(num_tokens)

  @stateful.rule(rows=st.lists(st.booleans(), min_size=B, max_size=B))
  def release(self, rows):
    self.table = release(self.table, jnp.asarray(rows))
    self.model.release(rows)

  @stateful.rule(
    parents=st.lists(st.integers(-1, B + 1), min_size=B, max_size=B)
  )
  def fork(self, parents):
    self.table, ok = fork(self.table, i32(parents))
    assert self.model.fork(parents) == ok.tolist()

  @stateful.rule(num_tokens=few)
  def copy_on_write(self, num_tokens):
    table, sources, targets, ok = copy_on_write(self.table, i32(num_tokens))
    want_ok, copies = self.model.copy_on_write(num_tokens)
    assert want_ok == ok.tolist()
    kinds = 2 if self.combined else 1
    sources = np.asarray(sources).reshape(kinds, B)
    targets = np.asarray(targets).reshape(kinds, B)
    made = {b: (old[:kinds], new[:kinds]) for b, old, new in copies}
    for b in range(B):
      old, new = made.get(b, ((P,) * kinds,) * 2)
      assert tuple(sources[:, b]) == old and tuple(targets[:, b]) == new
    self.table = table

  @stateful.invariant()
  def agrees(self):
    paged_jax.check_invariants(self.table)
    kinds = 2 if self.combined else 1
    want = np.full((B, kinds, M), P)
    for b, row in enumerate(self.model.rows):
      for column, pages in enumerate(row):
        want[b, :, column] = pages[:kinds]
    pages = np.asarray(self.table.pages).reshape(B, kinds, M)
    np.testing.assert_array_equal(pages, want)
    assert self.table.lengths.tolist() == self.model.lengths
    assert self.table.ref_counts.tolist() == self.model.counts
    assert int(self.table.num_free) == self.model.counts.count(0)

  def teardown(self):
    # No leak: after all rows are released every page is free again.
    table = release(self.table, jnp.ones(B, bool))
    assert int(table.num_free) == P


class CombinedMachine(PageTableMachine):
  combined = True


_quick = functools.partial(settings, deadline=None, stateful_step_count=25)
TestSeparate = PageTableMachine.TestCase
TestSeparate.settings = _quick(max_examples=30)
TestCombined = CombinedMachine.TestCase
TestCombined.settings = _quick(max_examples=30)
