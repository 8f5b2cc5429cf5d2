"""The task graph: counts, structure, variants."""

import math

import numpy as np
import pytest

from paged_jax.simulate import cases
from paged_jax.simulate import graph as graph_lib
from paged_jax.simulate.graph import Kind

LENGTHS = np.array([33, 0, 64, 128, 15, 1, 81])
VARIANTS = (
  "serial", "unroll2", "unroll3", "unroll100", "split2", "split3", "split100",
  "unroll2+split3",
)


def build(text, lengths=LENGTHS, block=16):
  return graph_lib.build(lengths, block, graph_lib.parse_variant(text))


def test_readme_counts():
  graph = graph_lib.build(np.array([256, 256]), 64)
  assert (graph.tasks, graph.edges) == (32, 30)


@pytest.mark.parametrize("name", cases.simulated_ids())
def test_counts_of_public_cases_are_exact(name):
  entry = cases.public_cases()[name]
  for case in cases.runs(name):
    graph = graph_lib.build(case.lengths, entry["page_size"])
    blocks = [math.ceil(n / entry["page_size"]) for n in case.lengths]
    assert graph.tasks == 4 * sum(blocks)
    assert graph.edges == sum(4 * n - 1 for n in blocks)
    if "tasks" in entry:
      assert graph.tasks == entry["tasks"]


def test_serial_edges():
  graph = graph_lib.build(np.array([2, 0, 3]), 1)
  edges = {
    (graph.name(source), graph.name(task))
    for task in range(graph.tasks)
    for source in graph.predecessors[task]
    if source >= 0
  }
  want = set()
  for b, blocks in ((0, 2), (2, 3)):
    for j in range(blocks):
      want |= {
        (f"QK b{b} j{j}", f"SOFTMAX b{b} j{j}"),
        (f"SOFTMAX b{b} j{j}", f"PV b{b} j{j}"),
        (f"PV b{b} j{j}", f"UPDATE b{b} j{j}"),
      }
      if j:
        want.add((f"UPDATE b{b} j{j - 1}", f"UPDATE b{b} j{j}"))
  assert edges == want


@pytest.mark.parametrize("text", VARIANTS)
def test_every_block_is_covered_once_by_every_stage(text):
  graph = build(text)
  for row, length in enumerate(LENGTHS):
    for kind in (Kind.QK, Kind.SOFTMAX, Kind.PV, Kind.UPDATE):
      at = (graph.sequence == row) & (graph.kind == kind)
      covered = [
        block
        for first, count in zip(graph.first[at], graph.blocks[at])
        for block in range(first, first + count)
      ]
      assert covered == list(range(math.ceil(length / 16)))


@pytest.mark.parametrize("text", VARIANTS)
def test_every_sequence_is_a_tree_with_one_root(text):
  graph = build(text)
  assert graph.edges == graph.tasks - np.count_nonzero(LENGTHS)
  roots = graph.sequence[graph.successor < 0]
  assert roots.tolist() == np.nonzero(LENGTHS)[0].tolist()
  for task, sources in enumerate(graph.predecessors):
    for source in sources[sources >= 0]:
      assert source < task
      assert graph.successor[source] == task
      assert graph.sequence[source] == graph.sequence[task]
  wants = {Kind.QK: (), Kind.SOFTMAX: (Kind.QK,), Kind.PV: (Kind.SOFTMAX,)}
  for task in range(graph.tasks):
    left, right = graph.predecessors[task]
    kind = Kind(int(graph.kind[task]))
    if kind in wants:
      assert right < 0
      found = () if left < 0 else (graph.kind[left],)
      assert found == wants[kind]
    elif kind == Kind.UPDATE:
      assert graph.kind[left] == Kind.PV
      assert right < 0 or graph.kind[right] == Kind.UPDATE
    else:
      for source in (left, right):
        assert graph.kind[source] in (Kind.UPDATE, Kind.MERGE)


def depth(graph):
  """Longest chain of updates and merges."""
  state = graph.kind >= Kind.UPDATE
  depths = np.zeros(graph.tasks, int)
  for task in np.nonzero(state)[0]:
    before = [p for p in graph.predecessors[task] if p >= 0 and state[p]]
    depths[task] = 1 + max((depths[p] for p in before), default=0)
  return depths.max()


@pytest.mark.parametrize("blocks", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_split_shortens_the_chain_by_a_tree(blocks, splits):
  variant = graph_lib.Variant(splits=splits)
  graph = graph_lib.build(np.array([blocks]), 1, variant)
  used = min(splits, blocks)
  assert graph.tasks == 4 * blocks + used - 1
  assert depth(graph) <= math.ceil(blocks / used) + math.ceil(math.log2(used))


def test_unroll_divides_tasks_and_chain():
  graph = graph_lib.build(np.array([33]), 1, graph_lib.Variant(group=4))
  assert graph.tasks == 4 * 9 and depth(graph) == 9
  assert graph.blocks[graph.kind == Kind.QK].tolist() == [4] * 8 + [1]


def test_no_tokens_no_tasks():
  for lengths in (np.zeros(3, int), np.zeros(0, int)):
    graph = graph_lib.build(lengths, 16, graph_lib.Variant(splits=2))
    assert (graph.tasks, graph.edges) == (0, 0)


@pytest.mark.parametrize("text", VARIANTS)
def test_variant_reads_what_it_writes(text):
  assert str(graph_lib.parse_variant(text)) == text


@pytest.mark.parametrize(
  "text", ["", "unroll", "split", "serial2", "unroll2split2", "split2+unroll2"]
)
def test_unknown_variant(text):
  with pytest.raises(ValueError, match="write serial, unrollN, splitN"):
    graph_lib.parse_variant(text)


def test_bad_numbers():
  with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
    graph_lib.parse_variant("split0")
  with pytest.raises(ValueError, match="block must be at least 1, got 0"):
    graph_lib.build(LENGTHS, 0)
