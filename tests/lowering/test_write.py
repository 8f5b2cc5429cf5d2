"""The slot writer lowers for CUDA, in place, on a host without a GPU."""

import re

import jax
import jax.numpy as jnp
import pytest

import paged_jax
from tests.lowering import cuda


@pytest.mark.parametrize("one_pool", (False, True))
@pytest.mark.parametrize("T, K, H, p, dtype", (
  (1, 8, 128, 16, "bfloat16"),
  (2048, 8, 128, 16, "bfloat16"),
  (64, 2, 64, 1, "float16"),
  (100, 5, 80, 8, "bfloat16"),
  (3, 1, 256, 256, "float32"),
))
def test_one_kernel_takes_over_the_pools(T, K, H, p, dtype, one_pool):
  def run(k_pages, v_pages, k, slots, layer):
    return paged_jax.write_kv(
      k_pages, v_pages, k, k, slots, layer=layer, implementation="triton",
      interpret=False,
    )

  pool = jax.ShapeDtypeStruct((4, 50, K, p, H), dtype)
  text = cuda.lower(
    run,
    pool,
    None if one_pool else pool,
    jax.ShapeDtypeStruct((T, K, H), dtype),
    jax.ShapeDtypeStruct((2, T) if one_pool else (T,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  assert text.count("__gpu$xla.gpu.triton") == 1
  assert '"write_kv"' in text
  aliases = re.findall(r"output_operand_alias<[^>]*>", text)
  operands = [re.search(r"operand_index = (\d+)", x)[1] for x in aliases]
  assert operands == (["4"] if one_pool else ["4", "5"])
