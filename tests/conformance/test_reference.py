"""The reference against NumPy float64, and in float64 itself."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance import data, suite


class TestReference(suite.AttentionConformance):
  implementation = "reference"

  def test_float64_agrees_with_numpy_to_rounding(self):
    made = self.prefill(33, window=13, soft_cap=5.0, sinks=True, combined=True)
    with jax.enable_x64(True):
      wide = made.replace(
        query=jnp.asarray(np.asarray(made.query), jnp.float64),
        k_pages=jnp.asarray(np.asarray(made.k_pages), jnp.float64),
        v_pages=jnp.asarray(np.asarray(made.v_pages), jnp.float64),
      )
      out, lse = self.call(wide)
      out, lse = np.asarray(out), np.asarray(lse)
    want, want_lse = data.expected(made)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, want, atol=1e-13)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)

  def test_long_prompts_walk_in_query_blocks(self):
    # More queries than one block: rows of two blocks must not touch others'.
    self.check(self.problem(34, lengths=(150, 140, 2),
                            query_lengths=(150, 130, 2)))
