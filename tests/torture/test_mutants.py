"""Breaks lines one at a time: masks, zeros, merges; a test must notice each.

    python -m pytest -m slow tests/torture/test_mutants.py

Each mutant is a copy of the package with one expression replaced. The test
named beside it runs on the copy and has to fail. What is named by its place is
that test; anything else, a test of the implementation's conformance suite.
"""

import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from tests.torture import mutants_hopper

ROOT = pathlib.Path(__file__).parents[2]

# (file, expression, replacement, a conformance test that must fail)
MUTANTS = {
  # The reference.
  "reference: dead K and V not zeroed": (
    "reference.py",
    "return jnp.where(live[:, None], tokens, 0)",
    "return tokens",
    "test_ragged_lengths",
  ),
  "reference: not causal": (
    "reference.py",
    "seen &= positions <= at\n",
    "seen &= True\n",
    "test_ragged_lengths",
  ),
  "reference: no window": (
    "reference.py",
    "seen &= positions > at - inputs.window",
    "seen &= True",
    "test_window",
  ),
  "reference: queries before position 0 see keys": (
    "reference.py",
    "seen = live & (at >= 0)",
    "seen = live & (at > -99)",
    "test_more_queries_than_keys_without_causal",
  ),
  "reference: logits not masked": (
    "reference.py",
    "jnp.where(seen[:, None, None], logits, -jnp.inf)",
    "logits",
    "test_ragged_lengths",
  ),
  "reference: a block's tail overwrites the next row": (
    "reference.py",
    "mine = (rows < end)[:, None]",
    "mine = (rows < end + 1)[:, None]",
    "test_rows_without_queries_and_tokens_beyond_the_last_row",
  ),
  "reference: fully masked rows are not 0": (
    "reference.py",
    "m = jnp.where(jnp.isneginf(m), 0, m)",
    "m = m + 0",
    "test_ragged_lengths",
  ),
  # Plain jnp.
  "xla: dead K and V not zeroed": (
    "xla.py",
    "dead = jnp.any((bounds[0] > 0) | (bounds[1] < p))",
    "dead = jnp.any(bounds[0] > 2**30)",
    "test_dead_slots_change_no_bit",
  ),
  "xla: keys past the length seen": (
    "xla.py",
    "live = (offset >= bounds[0][..., None]) & (offset < bounds[1][..., None])",
    "live = (offset >= bounds[0][..., None]) & (offset < p)",
    "test_ragged_lengths",
  ),
  "xla: keys before the window seen": (
    "xla.py",
    "live = (offset >= bounds[0][..., None]) & (offset < bounds[1][..., None])",
    "live = (offset >= 0) & (offset < bounds[1][..., None])",
    "test_window",
  ),
  "xla: not causal": (
    "xla.py",
    "mask &= position[:, None] <= here[..., None]",
    "mask &= True",
    "test_ragged_lengths",
  ),
  "xla: no window": (
    "xla.py",
    "mask &= position[:, None] > here[..., None] - inputs.window",
    "mask &= True",
    "test_window",
  ),
  "xla: queries before position 0 see keys": (
    "xla.py",
    "mask = mask & (here >= 0)[..., None]",
    "mask = mask & (here >= -99)[..., None]",
    "test_more_queries_than_keys_without_causal",
  ),
  "xla: logits not masked": (
    "xla.py",
    "return jnp.where(self._mask(tile), logits, -jnp.inf)",
    "return logits + 0",
    "test_ragged_lengths",
  ),
  # The Triton kernels.
  "triton: keys past the length seen": (
    "triton_tiles.py",
    "live = (positions >= seen[0]) & (positions < seen[1])",
    "live = positions >= seen[0]",
    "test_ragged_lengths",
  ),
  "triton: slots before the window read": (
    "triton_tiles.py",
    "live = (positions >= seen[0]) & (positions < seen[1])",
    "live = positions < seen[1]",
    "test_slots_before_the_window_change_no_bit",
  ),
  "triton: not causal": (
    "triton_tiles.py",
    "visible &= positions[None] <= at[:, None]",
    "visible &= True",
    "test_ragged_lengths",
  ),
  "triton: no window": (
    "triton_tiles.py",
    "visible &= positions[None] > at[:, None] - tiles.window",
    "visible &= True",
    "test_window",
  ),
  "triton: logits not masked": (
    "triton_tiles.py",
    "s = jnp.where(visible, s, -jnp.inf)",
    "s = s + 0",
    "test_ragged_lengths",
  ),
  "triton: dead V loaded": (
    "triton_tiles.py",
    "v = load_tile(v_rows, table, column, offset, live)",
    "v = load_tile(v_rows, table, column, offset, None)",
    "test_dead_slots_change_no_bit",
  ),
  "triton: V pages by K's table": (
    "triton_tiles.py",
    "v = load_tile(v_rows, table, column, offset, live)",
    "v = load_tile(v_rows, k_table, column, offset, live)",
    "test_combined_tables",
  ),
  "triton: fully masked rows are not 0": (
    "triton_tiles.py",
    "out = acc * (decay / jnp.where(l == 0, 1.0, l))[:, None]",
    "out = acc * (decay / l)[:, None]",
    "test_more_queries_than_keys",
  ),
  "triton: a dead partial is merged": (
    "triton_decode.py",
    "live = piece < pieces",
    "live = piece < pieces + 1",
    "test_ragged_lengths",
  ),
} | {
  f"hopper: {name}": mutant for name, mutant in mutants_hopper.MUTANTS.items()
}


def _run(folder, test, file):
  implementation = file.removesuffix(".py").partition("_")[0]
  which = [f"tests/conformance/test_{implementation}.py", "-k", test]
  if "::" in test:
    which = [test, "-m", "slow or not slow"]
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-x",
      "-q",
      "-p",
      "no:cacheprovider",
      *which,
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=600,
  )


def _copy(folder):
  skip = shutil.ignore_patterns("__pycache__")
  for name in ("paged_jax", "tests"):
    shutil.copytree(ROOT / name, folder / name, ignore=skip)
  shutil.copy(ROOT / "setup.cfg", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_notices(name, tmp_path):
  if name.startswith("hopper: ") and jax.__version_info__ < (0, 11):
    pytest.skip("hopper needs jax 0.11")
  file, old, new, test = MUTANTS[name]
  _copy(tmp_path)
  path = tmp_path / "paged_jax" / "ops" / file
  text = path.read_text()
  assert text.count(old) == 1, f"{file} no longer holds: {old}"
  path.write_text(text.replace(old, new))
  result = _run(tmp_path, test, file)
  assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
  assert "failed" in result.stdout or "FAILED" in result.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_still_applies(name):
  file, old, _, _ = MUTANTS[name]
  assert (ROOT / "paged_jax" / "ops" / file).read_text().count(old) == 1
