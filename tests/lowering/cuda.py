"""Lowering for an H100 on any host: abstract device, no GPU, no compile."""

from collections.abc import Callable

import jax


def lower(run: Callable, *shapes: jax.ShapeDtypeStruct | None) -> str:
  """Returns the StableHLO text of `run` lowered for CUDA."""
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(run).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
