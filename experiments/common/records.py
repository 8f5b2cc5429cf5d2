"""Rows on disk: one JSON object a line, safe the moment it is appended."""

import dataclasses
import json
import os
import pathlib
from typing import Any, TextIO

_FINISHED = ("ok", "unsupported")


@dataclasses.dataclass(frozen=True)
class Records:
  """A JSONL file of rows, each with a `key` and a `status`."""

  path: pathlib.Path

  def append(self, row: dict[str, Any]) -> None:
    """Appends a row and waits until the disk has it."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open("a+", encoding="utf-8") as file:
      # A line cut short by a crash must not swallow this row.
      if file.tell() and self.path.read_bytes()[-1:] != b"\n":
        file.write("\n")
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def rows(self) -> list[dict[str, Any]]:
    """Returns the last row of every key, in order of first appearance."""
    rows: dict[str, dict[str, Any]] = {}
    if self.path.exists():
      for line in self.path.read_text(encoding="utf-8").splitlines():
        try:
          row = json.loads(line)
        except json.JSONDecodeError:
          continue  # cut short by a crash
        rows[row["key"]] = row
    return list(rows.values())

  def finished(self) -> set[str]:
    """Returns the keys that need not run again; failed ones do."""
    return {row["key"] for row in self.rows() if row["status"] in _FINISHED}

  def set_aside(self) -> pathlib.Path | None:
    """Renames an existing file, so that a fresh start loses nothing."""
    if not self.path.exists():
      return None
    number = 1
    while (old := self.path.with_suffix(f".{number}.jsonl")).exists():
      number += 1
    return self.path.rename(old)


def fresh(path: pathlib.Path) -> TextIO:
  """Opens a JSONL file to write; an older one is set aside, and that told."""
  if old := Records(path).set_aside():
    print(f"an earlier run's rows are kept as {old}")
  return path.open("w", encoding="utf-8")
