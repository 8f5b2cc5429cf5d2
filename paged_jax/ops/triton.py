"""Implementation `triton`: Pallas kernels that Triton compiles, for any GPU.

Two kernels: with few query tokens a sequence the KV is split over the chip
(triton_decode), otherwise each tile of queries walks its keys alone
(triton_prefill).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_jax.ops import triton_decode, triton_prefill
from paged_jax.ops.inputs import Inputs

_FEW_QUERIES = 16  # up to here the query rows of a kv head fit few tiles


def attend(
  inputs: Inputs, *, plan: object = None, interpret: bool = False
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Returns the attention output and the natural-log LSE of every token.

  Raises:
    NotImplementedError: float64.
  """
  del plan  # The kernels find their own work.
  dtype = inputs.query.dtype
  if dtype == jnp.float64:
    raise NotImplementedError(
      "float64: use implementation='reference', or cast to float32"
    )
  if not (inputs.num_tokens and inputs.num_sequences):
    lse = jnp.full(inputs.query.shape[:2], -jnp.inf, jnp.float32)
    return jnp.zeros_like(inputs.query), lse
  if inputs.max_query_length <= _FEW_QUERIES:
    return triton_decode.attend(inputs, interpret=interpret)
  return triton_prefill.attend(inputs, interpret=interpret)
