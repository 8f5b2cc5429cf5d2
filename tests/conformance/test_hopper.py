"""The Pallas Mosaic GPU kernels under the shared suite.

Native on an H100 or H200. On a CPU they are interpreted with race detection,
25 ms a tile: that is the slow layer.
"""

import types

import jax
import pytest

from tests.conformance import suite

_ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)
class TestHopper(suite.AttentionConformance):
  implementation = "hopper"
  dtypes = ("bfloat16", "float16")
  max_query = 8
  base = types.MappingProxyType(dict(N=4, K=2, H=64, p=8))


if not _ON_GPU:
  TestHopper = pytest.mark.slow(TestHopper)
