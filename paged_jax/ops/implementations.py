"""The implementations of paged attention by name, and the automatic choice.

An implementation is a module with

    attend(inputs, *, plan, interpret) -> (out [T, N, H], lse [T, N])
    make_plan(page_table, lengths, query_starts, geometry, *, num_tokens,
      batch_invariant, shared_prefix, memory_order) -> pytree  (optional)

`plan` is what its own `make_plan` returned, or None. It raises
NotImplementedError, before it does anything else, for what it cannot do; the
automatic choice then takes the next one.
"""

import importlib
import types

import jax

_MODULES = {
  "hopper": "paged_jax.ops.hopper",
  "triton": "paged_jax.ops.triton",
  "xla": "paged_jax.ops.xla",
  "reference": "paged_jax.ops.reference",
}

NAMES = tuple(_MODULES)

# Those that are Pallas kernels, and so can be interpreted.
PALLAS = ("hopper", "triton")


def load(name: str) -> types.ModuleType:
  """Returns the module of implementation `name`."""
  if name not in _MODULES:
    raise ValueError(
      f"implementation is {name!r}: pass None (automatic) or one of "
      f"{', '.join(NAMES)}"
    )
  return importlib.import_module(_MODULES[name])


def candidates(name: str | None) -> tuple[str, ...]:
  """Returns the names to try in order: `name` alone, or the automatic ones."""
  if name is not None:
    return (name,)
  if jax.default_backend() in ("gpu", "cuda"):
    return ("hopper", "triton", "xla")
  return ("xla",)


def resolve_interpret(interpret: bool | None) -> bool:
  """None means: natively on a GPU, interpreted elsewhere."""
  if interpret is None:
    return jax.default_backend() not in ("gpu", "cuda")
  if not isinstance(interpret, bool):
    raise ValueError(f"interpret is {interpret!r}: pass None, True or False")
  return interpret
