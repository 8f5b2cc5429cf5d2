"""The Pallas Mosaic GPU kernels under the shared suite.

Native on an H100 or H200. On a CPU they are interpreted with race detection,
25 ms a tile: that is the slow layer.
"""

import types

import jax
import pytest

from tests.conformance import suite

_ON_GPU = jax.default_backend() == "gpu"


_needs_jax = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)


@_needs_jax
class TestHopper(suite.AttentionConformance):
  """Decode, and up to 8 query tokens a sequence."""

  implementation = "hopper"
  dtypes = ("bfloat16", "float16")
  max_query = 8
  base = types.MappingProxyType(dict(N=4, K=2, H=64, p=8))


@_needs_jax
class TestHopperPrefill(suite.AttentionConformance):
  """Any number of query tokens: the prefill kernel, where there are many."""

  implementation = "hopper"
  dtypes = ("bfloat16", "float16")
  base = types.MappingProxyType(dict(N=4, K=2, H=64, p=8))


if not _ON_GPU:
  TestHopper = pytest.mark.slow(TestHopper)
  TestHopperPrefill = pytest.mark.slow(TestHopperPrefill)
