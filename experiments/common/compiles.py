"""How many programs XLA compiles while a block of code runs."""

from collections.abc import Iterator
import contextlib
import dataclasses

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Count:
  """Programs compiled so far, and the seconds that took."""

  programs: int = 0
  seconds: float = 0.0


@contextlib.contextmanager
def count() -> Iterator[Count]:
  """Yields a count that grows with every program compiled inside."""
  total = Count()

  def listener(event: str, seconds: float, **_: object) -> None:
    if event == _EVENT:
      total.programs += 1
      total.seconds += seconds

  monitoring.register_event_duration_secs_listener(listener)
  try:
    yield total
  finally:
    monitoring.unregister_event_duration_listener(listener)
