"""Data walks one way through the packages, and so do imports."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parent.parent / "paged_jax"

# What a package may import of the project, beside itself.
_ALLOWED = {
  "cache": set(),
  "ops": {"data"},
  "models": {"cache", "ops", "nnx"},
  "nnx": {"models"},
  "linen": {"models"},
  "engine": {"cache", "ops", "models"},
  "simulate": set(),
  "train": {"models"},
}


def _imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: import by full name"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", _ALLOWED)
def test_imports_go_one_way(package):
  folder = _ROOT / package
  files = sorted(folder.rglob("*.py")) or [_ROOT / f"{package}.py"]
  assert all(file.is_file() for file in files)
  for file in files:
    for name in _imported(file):
      first, *rest = name.split(".")
      assert first not in ("experiments", "configs", "tests"), (file, name)
      if first == "paged_jax":
        assert rest[0] in _ALLOWED[package] | {package}, (file, name)
