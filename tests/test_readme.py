"""README's snippet runs, and its commands name what exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _block(marker):
  found = re.search(rf"<!-- {marker}.*?-->\n```\w+\n(.*?)```", README, re.S)
  assert found, f"README.md has no block marked {marker!r}"
  return found[1]


def test_the_snippet_runs():
  names = {}
  exec(_block("snippet"), names)
  assert names["out"].shape == (47, 32, 128)
  assert bool(names["ok"].all())
  assert names["table"].lengths.tolist() == [40, 7]


def test_the_flax_snippet_runs():
  names = {}
  exec(_block("flax"), names)
  assert names["y"].shape == (48, 64)
  assert bool(names["ok"].all())


def test_the_commands_name_what_exists():
  for marker in ("command: sweep", "command: test"):
    command = _block(marker).strip()
    assert "\n" not in command
    assert command.startswith("python3 -m venv .venv && ")
  assert (ROOT / "configs" / "qwen.py").exists()


def test_links_lead_somewhere():
  for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
    assert (ROOT / target).exists(), target
