"""The jnp implementation under the shared suite."""

from tests.conformance import suite


class TestXla(suite.AttentionConformance):
  implementation = "xla"
