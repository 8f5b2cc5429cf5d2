"""Implementation `triton` where the shared suite's small problems don't go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import triton_tiles
from tests.conformance import data


def check(made):
  out, lse = data.call(made, "triton")
  data.assert_right(made, out, lse)


@pytest.mark.parametrize("w", [0, 1, 2, 4, 5, 9])
def test_find_walks_the_list_of_pieces(w):
  counts = jnp.array([2, 0, 3, 0], jnp.int32)
  pieces = [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
  row, piece = triton_tiles.find(counts, jnp.int32(w))
  if w < len(pieces):
    assert (int(row), int(piece)) == pieces[w]
  else:
    assert int(row) >= len(counts)


def test_long_and_short_sequences_split_into_chunks():
  # Tiles of 32 keys, chunks shared out by length: 19 tiles, 1, none, 2.
  check(data.problem(40, lengths=(600, 3, 0, 64), N=4, K=2, H=32, p=16))


def test_a_group_larger_than_a_tile():
  check(data.problem(41, lengths=(70, 5), N=80, K=1, H=16, p=8))


@pytest.mark.parametrize("causal", [True, False])
def test_few_query_tokens_a_sequence(causal):
  check(
    data.problem(
      42, lengths=(90, 4, 7, 0, 33), query_lengths=(4, 4, 0, 0, 1),
      max_query_length=4, N=6, K=2, H=32, p=8, causal=causal,
    )
  )


@pytest.mark.parametrize("causal, window", [(True, None), (True, 40),
                                            (False, None)])
def test_prefill_over_many_tiles(causal, window):
  check(
    data.problem(
      43, lengths=(150, 37, 100), query_lengths=(90, 37, 1), N=6, K=2, H=32,
      p=16, causal=causal, window=window, dtype=jnp.bfloat16,
    )
  )


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_widest_group_and_odd_head_dim(phase):
  queries = None if phase == "decode" else (17, 3)
  check(data.problem(44, lengths=(40, 3), query_lengths=queries, N=128, K=1,
                     H=24, p=3, dtype=jnp.float16))


def test_vmap_over_tables_and_layers():
  made = data.problem(45, lengths=(40, 9), L=3)
  layers = jnp.arange(3, dtype=jnp.int32)
  out, lse = jax.vmap(
    lambda layer: data.call(made, "triton", jit=False, layer=layer)
  )(layers)
  for i in range(3):
    one = made.replace(k_pages=made.k_pages[i], v_pages=made.v_pages[i])
    data.assert_right(one, out[i], lse[i])


def test_no_tokens_and_no_sequences():
  made = data.problem(46, lengths=(4, 4))
  out, lse = paged_jax.paged_attention(
    made.query[:0], made.k_pages, made.v_pages, made.page_table[:0],
    made.lengths[:0], implementation="triton", return_lse=True,
  )
  assert out.shape == (0, 4, 32) and lse.shape == (0, 4)


def test_float64_is_refused():
  made = data.problem(47, lengths=(4,))
  with jax.enable_x64(True):
    wide = [np.asarray(x, np.float64) for x in made.arrays[:3]]
    with pytest.raises(NotImplementedError, match="float64"):
      paged_jax.paged_attention(
        *wide, made.page_table, made.lengths, implementation="triton"
      )


def test_more_pool_rows_than_int32_are_refused():
  shape = jax.ShapeDtypeStruct
  pool = shape((2**26, 8, 8, 16), jnp.bfloat16)  # 2**32 rows of H
  with pytest.raises(NotImplementedError, match="fewer"):
    jax.eval_shape(
      lambda *args: paged_jax.paged_attention(*args, implementation="triton"),
      shape((1, 8, 16), jnp.bfloat16), pool, pool, shape((1, 4), jnp.int32),
      shape((1,), jnp.int32),
    )
