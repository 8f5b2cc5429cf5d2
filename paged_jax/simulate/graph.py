"""Paged attention of one decode step as a task graph.

    serial                    unrolled by 2           split in 2, tree merge

    QK SF PV -> UP            QK SF PV -> UP          QK SF PV -> UP
                |               (2 blocks)  |         QK SF PV -> UP --+
    QK SF PV -> UP            QK SF PV -> UP                           MG
                |               (2 blocks)            QK SF PV -> UP   |
    QK SF PV -> UP                                    QK SF PV -> UP --+

A task covers all heads of one sequence. Every task has at most two
predecessors and one successor, and ids grow along the edges, so the graph is
three int arrays: a 65,536-task graph takes milliseconds and no objects.
"""

import dataclasses
import enum
import re

from jaxtyping import Int
import numpy as np


class Kind(enum.IntEnum):
  """What a task does; `MERGE` runs the update kernel on two chains."""

  QK = 0
  SOFTMAX = 1
  PV = 2
  UPDATE = 3
  MERGE = 4


class Unit(enum.IntEnum):
  """The two classes of units of the chip."""

  MATRIX = 0
  VECTOR = 1


UNIT_OF_KIND = np.array(
  [Unit.MATRIX, Unit.VECTOR, Unit.MATRIX, Unit.VECTOR, Unit.VECTOR], np.int8
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """How the blocks of a sequence become tasks.

  Attributes:
    group: blocks a task covers; 1 is one task a block and stage.
    splits: update chains a sequence is cut into, merged pairwise as a tree.
  """

  group: int = 1
  splits: int = 1

  def __post_init__(self):
    for name in ("group", "splits"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {getattr(self, name)}"
        )

  def __str__(self) -> str:
    parts = [f"unroll{self.group}"] if self.group > 1 else []
    parts += [f"split{self.splits}"] if self.splits > 1 else []
    return "+".join(parts) or "serial"


def parse_variant(text: str) -> Variant:
  """Reads "serial", "unroll8", "split4" or "unroll8+split4"."""
  found = re.fullmatch(r"serial|unroll(\d+)(?:\+split(\d+))?|split(\d+)", text)
  if not found:
    raise ValueError(
      f'unknown variant "{text}": write serial, unrollN, splitN or '
      "unrollN+splitN"
    )
  group, both, alone = found.groups()
  return Variant(group=int(group or 1), splits=int(both or alone or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
  """A task graph; task ids are positions, and every edge goes upward.

  Attributes:
    variant: how it was made.
    kind: `Kind` of each task.
    sequence: the sequence a task belongs to.
    first: first block a task covers (0 for a merge).
    blocks: blocks a task covers (0 for a merge).
    predecessors: ids, -1 for none. Column 0 is the data of this block (or the
      left chain of a merge), column 1 the state of the chain (or the right).
    successor: id of the one task that waits for this one, -1 for none.
  """

  variant: Variant
  kind: Int[np.ndarray, "tasks"]
  sequence: Int[np.ndarray, "tasks"]
  first: Int[np.ndarray, "tasks"]
  blocks: Int[np.ndarray, "tasks"]
  predecessors: Int[np.ndarray, "tasks 2"]
  successor: Int[np.ndarray, "tasks"]

  @property
  def tasks(self) -> int:
    return len(self.kind)

  @property
  def edges(self) -> int:
    return int((self.predecessors >= 0).sum())

  @property
  def unit(self) -> Int[np.ndarray, "tasks"]:
    """The `Unit` class that each task runs on."""
    return UNIT_OF_KIND[self.kind]

  def name(self, task: int) -> str:
    """Returns for example "QK b3 j7", "PV b3 j4-7" or "MERGE b3"."""
    kind, row = Kind(int(self.kind[task])), int(self.sequence[task])
    if kind == Kind.MERGE:
      return f"MERGE b{row}"
    first, count = int(self.first[task]), int(self.blocks[task])
    last = f"-{first + count - 1}" if count > 1 else ""
    return f"{kind.name} b{row} j{first}{last}"


def build(
  lengths: Int[np.ndarray, "B"], block: int, variant: Variant | None = None
) -> Graph:
  """Builds the task graph of one decode step.

  Without a variant (serial) a sequence of n blocks has 4 n tasks and 4 n - 1
  edges: QK_j -> SF_j -> PV_j -> UP_j and UP_{j-1} -> UP_j. Tasks are ordered by
  sequence, then block, then stage; merges come last in their sequence.

  Args:
    lengths: tokens of each sequence; 0 has no tasks.
    block: tokens a block, at least 1.
    variant: default serial.

  Returns:
    The graph.

  Raises:
    ValueError: a block below 1.
  """
  if block < 1:
    raise ValueError(f"block must be at least 1, got {block}")
  variant = variant or Variant()
  counts = -(-np.asarray(lengths, np.int64) // block)
  # Sequences of equally many blocks have equal graphs, shifted.
  parts = {int(n): _sequence(int(n), variant) for n in np.unique(counts)}
  sizes = np.array([parts[int(n)].shape[1] for n in counts], np.int64)
  shift = np.repeat(np.cumsum(sizes) - sizes, sizes)
  rows = np.concatenate(
    [parts[int(n)] for n in counts] or [np.zeros((6, 0), np.int32)], axis=1
  )
  kind, first, blocks, left, right, successor = rows

  def shifted(ids):
    return np.where(ids < 0, -1, ids + shift).astype(np.int32)

  return Graph(
    variant=variant,
    kind=kind.astype(np.int8),
    sequence=np.repeat(np.arange(len(counts)), sizes).astype(np.int32),
    first=first,
    blocks=blocks,
    predecessors=np.stack([shifted(left), shifted(right)], axis=1),
    successor=shifted(successor),
  )


def _sequence(blocks: int, variant: Variant) -> Int[np.ndarray, "6 tasks"]:
  """The tasks of one sequence: kind, first, blocks, left, right, successor."""
  if not blocks:
    return np.zeros((6, 0), np.int32)
  firsts = np.arange(0, blocks, variant.group)
  groups = len(firsts)
  covered = np.minimum(variant.group, blocks - firsts)
  splits = min(variant.splits, groups)
  # Chain i covers groups [starts[i], starts[i + 1]), as even as possible.
  starts = np.arange(splits + 1) * groups // splits

  tasks = np.full((6, 4 * groups + splits - 1), -1, np.int32)
  kind, first, count, left, right, successor = tasks
  body = np.arange(4 * groups)
  kind[body] = body % 4
  first[body] = np.repeat(firsts, 4)
  count[body] = np.repeat(covered, 4)
  left[body] = np.where(body % 4 == Kind.QK, -1, body - 1)
  updates = np.arange(groups) * 4 + Kind.UPDATE
  right[updates[1:]] = updates[:-1]
  right[updates[starts[:-1]]] = -1

  # Pairwise, level by level; an odd chain out moves up unmerged.
  level, merge = list(updates[starts[1:] - 1]), 4 * groups
  while len(level) > 1:
    pairs = list(zip(level[::2], level[1::2]))
    above = list(range(merge, merge + len(pairs)))
    for task, (a, b) in zip(above, pairs):
      kind[task], first[task], count[task] = Kind.MERGE, 0, 0
      left[task], right[task] = a, b
    level, merge = above + level[2 * len(pairs) :], merge + len(pairs)
  for before in (left, right):
    has = before >= 0
    successor[before[has]] = np.nonzero(has)[0]
  return tasks
