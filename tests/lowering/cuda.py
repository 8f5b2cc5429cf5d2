"""Lowering and compiling for an H100 on any host: no GPU is needed."""

from collections.abc import Callable, Mapping
import importlib.util
import pathlib

import jax
from jax.experimental import topologies

_NAME = "NVIDIA H100 80GB HBM3"
_SMS = 132

# What XLA asks of the GPU it compiles for.
_TARGET = f"""
gpu_device_info {{
  cuda_compute_capability {{
    major: 9
    feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {_SMS}
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
}}
platform_name: "CUDA"
device_description_str: "{_NAME}"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 7 }}
"""


def lower(run: Callable, *shapes: jax.ShapeDtypeStruct | None) -> str:
  """Returns the StableHLO text of `run` lowered for CUDA."""
  return _lowered(run, shapes).as_text()


def no_compiler() -> str | None:
  """Says what is missing to compile for a GPU here; None: nothing is."""
  nvidia = importlib.util.find_spec("nvidia")
  folders = nvidia.submodule_search_locations if nvidia else ()
  if not any(any(pathlib.Path(x).glob("*/bin/ptxas")) for x in folders):
    return "no ptxas: pip install nvidia-cuda-nvcc-cu12"
  try:
    _device()
  except Exception as error:
    return f"no CUDA plugin (jax[cuda12]): {str(error).splitlines()[0]}"
  return None


def compile_(
  run: Callable,
  *shapes: jax.ShapeDtypeStruct | None,
  options: Mapping[str, bool | int | str] | None = None,
) -> jax.stages.Compiled:
  """Compiles `run` to machine code; `options` are XLA's flags."""
  sharding = jax.sharding.SingleDeviceSharding(_device())
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )
  return _lowered(run, placed).compile(compiler_options=options)


def _device():
  return topologies.get_topology_desc(
    platform="cuda", topology="1x1x1", target_config=_TARGET
  ).devices[0]


def _lowered(run, shapes):
  device = jax.sharding.AbstractDevice(
    device_kind=_NAME, platform="gpu", num_cores=_SMS
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
