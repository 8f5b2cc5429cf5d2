"""What this machine can do at best: read, copy and multiply.

Every fraction in a report is held against ceilings of the same run, since
clocks, cooling and neighbours differ from day to day. Of several ways to read
or multiply, the fastest counts. Random data: zeros draw less power and would
lift the ceiling.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.common import timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
  """The best of this run: GB/s (1e9 bytes) and TFLOP/s (1e12)."""

  read_gbps: float
  copy_gbps: float
  matmul_tflops: float  # in the dtype of the run

  def limit_us(self, num_bytes: int, flops: int) -> float:
    """Returns the roofline's time: reading or multiplying, the longer one."""
    return max(
      num_bytes / (self.read_gbps * 1e3), flops / (self.matmul_tflops * 1e6)
    )

  def bound_by(self, num_bytes: int, flops: int) -> str:
    """Returns which ceiling sets `limit_us`: "read" or "matmul"."""
    reading = num_bytes / self.read_gbps * 1e3 >= flops / self.matmul_tflops
    return "read" if reading else "matmul"

  def heats(self, num_bytes: int, flops: int) -> bool:
    """Whether the tensor cores are busy for half of `limit_us`, or more.

    So much of it takes a GPU to its power limit; see `timing`.
    """
    multiplying = flops / (self.matmul_tflops * 1e6)
    return multiplying >= self.limit_us(num_bytes, flops) / 2


def measure(dtype: str) -> Ceilings:
  """Measures the ceilings, in some 2 s.

  Args:
    dtype: of the matmul: "float32", "bfloat16" or "float16".
  """
  gpu = jax.default_backend() != "cpu"
  # Well beyond the caches: 1 GiB on a GPU, 128 MiB on a CPU.
  count = 2**28 if gpu else 2**25
  key = jax.random.key(0)
  x = jax.random.uniform(key, (count,), jnp.float32)
  n = 8192 if gpu else 1024
  a = jax.random.normal(key, (n, n), dtype)
  readers = (
    lambda x: x.sum(),
    lambda x: x.reshape(-1, 4096).sum(axis=1),
    lambda x: jnp.vdot(x, x),
    lambda x: x.reshape(-1, 4096).max(axis=0),
  )
  read = min(_us(f, x) for f in readers)
  copy = _us(lambda x: x + 1, x)
  matmul = _us(lambda a: a @ a, a)
  return Ceilings(
    read_gbps=x.nbytes / read / 1e3,
    copy_gbps=2 * x.nbytes / copy / 1e3,
    matmul_tflops=2 * n**3 / matmul / 1e6,
  )


def _us(function, x):
  compiled = jax.jit(function).lower(x).compile()
  jax.block_until_ready(compiled(x))
  measured = timing.kernels(lambda: compiled(x))
  if measured is not None:
    return measured[0].median_us
  return timing.wall(
    {"": lambda: compiled(x)}, repeats=5, seconds=0.1
  )[""].median_us
