"""The Pallas-Triton kernels under the shared suite; interpreted on a CPU."""

from tests.conformance import suite


class TestTriton(suite.AttentionConformance):
  implementation = "triton"
