"""Implementation `hopper`: its refusals, its interpreted decode kernels."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import hopper, hopper_pace, hopper_tuning
from paged_jax.ops.plan import Geometry
from tests.conformance import data

needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="hopper needs jax 0.11"
)

GEOMETRY = Geometry(
  num_heads=8, num_kv_heads=4, head_dim=64, page_size=16, dtype="bfloat16",
  max_query_length=1, causal=True, window=None, combined=False,
)


# --- what it takes on -------------------------------------------------------


@pytest.mark.parametrize("H", [64, 80, 96, 128, 192, 256])
def test_every_config_fits_an_sm(H):
  taken = refused = 0
  for K in (1, 2, 4, 8):
    for G in (1, 2, 3, 4, 5, 7, 8, 16, 64, 128):
      for p in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for Q in (1, 4, 8):
          geometry = dataclasses.replace(
            GEOMETRY, num_heads=K * G, num_kv_heads=K, head_dim=H, page_size=p,
            max_query_length=Q,
          )
          try:
            c = hopper_tuning.choose(geometry, 64, 100)
          except hopper_tuning.TooFewRows:
            assert K * p < 8 or G * 8 // p > 64 or (H > 128 and G > 48)
            refused += 1
            continue
          taken += 1
          assert c.stages >= 2
          assert c.tile == c.copies * c.step * c.kb
          assert c.token_rows * c.block_tokens <= 64 * c.consumers
          assert c.row_blocks * c.block_tokens >= Q
          bytes_ = hopper_tuning.fixed_bytes(c, H) + c.stages * c.tile * H * 4
          assert bytes_ <= 227 * 1024
  assert taken > 2 * refused


@pytest.mark.parametrize(
  "changes",
  [
    dict(dtype="float32"),
    dict(head_dim=32),
    dict(page_size=24),
    dict(page_size=512),
    dict(max_query_length=9),
    dict(num_heads=516),
  ],
)
def test_refuses(changes):
  geometry = dataclasses.replace(GEOMETRY, **changes)
  with pytest.raises(NotImplementedError):
    hopper_tuning.choose(geometry, 4, 10)


@pytest.mark.parametrize(
  "overrides",
  [dict(tile=96), dict(kb=3), dict(tile=64, kb=8), dict(tile=192, kb=4)],
)
def test_tiles_hold_whole_bundles_of_pages(overrides):
  geometry = dataclasses.replace(GEOMETRY, num_heads=32, num_kv_heads=8)
  config = hopper_tuning.choose(geometry, 4, 10, overrides=dict(tile=192, kb=2))
  assert (config.tile, config.copies) == (192, 6)
  with pytest.raises(ValueError, match="tile="):
    hopper_tuning.choose(
      dataclasses.replace(geometry, page_size=32), 4, 10, overrides=overrides
    )


def test_the_table_of_measured_tiles_is_taken(monkeypatch):
  geometry = dataclasses.replace(GEOMETRY, num_heads=16, num_kv_heads=4)
  row = hopper_tuning.table_key(geometry, 64) | dict(set=dict(tile=192, kb=2))
  monkeypatch.setattr(hopper_tuning, "_table", lambda: (row,))
  assert hopper_tuning.choose(geometry, 64, 99).tile == 192
  assert hopper_tuning.choose(geometry, 64, 99, overrides={}).tile == 128
  assert hopper_tuning.choose(geometry, 2, 99).tile == 64
  one = dataclasses.replace(geometry, num_heads=4, num_kv_heads=1)
  assert hopper_tuning.choose(one, 640, 99).kb == 1


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason="this jax has what hopper needs"
)
def test_refuses_an_older_jax():
  made = data.problem(lengths=(3,), H=64, dtype=jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="0.11"):
    data.call(made, "hopper", interpret=True)


def test_refuses_to_run_natively_without_a_gpu():
  if jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  made = data.problem(lengths=(3,), H=64, dtype=jnp.bfloat16)
  with pytest.raises(NotImplementedError):
    data.call(made, "hopper", interpret=False)


# --- the kernels: native on a GPU, else interpreted (barriers and races) ------


CASES = {
  "split segments": dict(lengths=(40, 0, 129, 16, 200), N=8, K=2, H=128,
                         sinks=True),
  "bundles of tiny pages": dict(lengths=(40, 0, 129), N=8, K=8, p=1),
  "rows off groups of 8": dict(lengths=(40, 129, 16), query_lengths=(2, 3, 1),
                               max_query_length=3, N=12, K=4, p=4),
  "a page larger than a tile": dict(lengths=(40, 0, 300), N=4, K=2, p=256),
  "window": dict(lengths=(40, 0, 229, 300), N=4, K=2, window=37),
  "a window from a tile's first position on": dict(
    lengths=(229,), query_lengths=(3,), max_query_length=3, N=4, K=2, window=99
  ),
  "few tokens": dict(lengths=(40, 5, 229, 3), query_lengths=(3, 2, 0, 1), T=9,
                     max_query_length=3, N=4, K=2, window=37, soft_cap=5.0,
                     combined=True),
  "more queries than keys": dict(lengths=(1, 5, 2), query_lengths=(2, 4, 3),
                                 max_query_length=4, N=4, K=2, causal=False),
  "an odd group": dict(lengths=(40, 21), query_lengths=(4, 2),
                       max_query_length=4, N=14, K=2),
  "many rows": dict(lengths=(40, 1029), N=128, K=1),
  "whole segments": dict(lengths=(40, 0, 229, 300), N=16, K=2, window=40,
                         sinks=True),
  "whole segments, many rows": dict(lengths=(40, 0, 129), N=128, K=1),
  "wide heads": dict(lengths=(40, 0, 129), N=8, K=2, H=192),
  "few heads of 80": dict(lengths=(40, 0, 129), N=2, K=2, H=80, sinks=True),
  "pages too small for a copy": dict(lengths=(40, 0, 29), N=4, K=1, p=2),
  "one pool, f16": dict(lengths=(40, 129), N=4, K=2, combined=True,
                        one_pool=True, dtype=jnp.float16),
}


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
  settings = dict(H=64, p=16, dtype=jnp.bfloat16) | CASES[name]
  made = data.problem(50, **settings)
  out, lse = data.call(made, "hopper")
  data.assert_right(made, out, lse)


@needs_interpreter
@pytest.mark.parametrize("query_tokens", [1, 8])  # rows: 8 a warp, or 16
def test_logits_that_grow(query_tokens):
  """The maximum rises from one tile to the next."""
  p, length = 16, 700
  made = data.problem(
    62, lengths=(length,), query_lengths=(query_tokens,),
    max_query_length=query_tokens, N=8, K=1, H=64, p=p, dtype=jnp.bfloat16,
  )
  positions = np.arange(length)
  pages = np.asarray(made.page_table)[0, positions // p]
  k = np.array(made.k_pages.astype(jnp.float32))
  k[pages, :, positions % p] *= (7 * positions / length)[:, None, None]
  made = made.replace(k_pages=jnp.asarray(k, jnp.bfloat16))
  data.assert_right(made, *data.call(made, "hopper"))


@needs_interpreter
@pytest.mark.parametrize("alternating", [False, True])
def test_slots_are_used_again(monkeypatch, alternating):
  """Many tiles a CTA, as many in flight as there are stages, or now fewer."""
  monkeypatch.setattr(hopper, "_INTERPRETED_CTAS", 1)
  monkeypatch.setattr(
    hopper_tuning, "measured", lambda *_: dict(tile=64, stages=3)
  )

  def next_(self, state, tile, counts):
    depth = jnp.where(lax.rem(tile, jnp.int32(4)) < 2, 1, self.config.stages)
    return state._replace(free=jnp.maximum(state.free, tile + 1 - depth))

  if alternating:
    monkeypatch.setattr(hopper_pace.Pace, "next", next_)
  made = data.problem(64, lengths=(330, 70), N=4, K=1, H=64, p=32,
                      dtype=jnp.bfloat16)
  data.assert_right(made, *data.call(made, "hopper"))


@needs_interpreter
@pytest.mark.parametrize(
  "num_ctas, lengths",
  [
    (16, (330, 130, 0, 50)),  # 5, 3 and 2 parts a segment
    pytest.param(48, (330, 30, 0, 9), marks=pytest.mark.slow),  # up to 21
  ],
)
def test_segments_of_many_parts(monkeypatch, num_ctas, lengths):
  """Rows without keys and tokens without a row are among them."""
  monkeypatch.setattr(hopper, "_INTERPRETED_CTAS", num_ctas)
  made = data.problem(
    60, lengths=lengths, query_lengths=(6, 1, 1, 2), T=12, max_query_length=6,
    N=32, K=1, H=64, p=16, dtype=jnp.bfloat16, sinks=True,
  )
  data.assert_right(made, *data.call(made, "hopper"))


@needs_interpreter
def test_a_plan_and_a_layer_in_a_scan():
  made = data.problem(51, lengths=(40, 129), N=4, K=2, H=64, p=16, L=2,
                      dtype=jnp.bfloat16)

  @jax.jit
  def run(query, k_pages, v_pages, table, lengths):
    plan = paged_jax.plan_attention(
      table, lengths, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16,
      dtype=query.dtype, implementation="hopper",
    )

    def layer(carry, index):
      return carry, paged_jax.paged_attention(
        query, k_pages, v_pages, table, lengths, layer=index, plan=plan,
        return_lse=True, implementation="hopper",
      )

    return jax.lax.scan(layer, 0, jnp.arange(2))[1]

  out, lse = run(*made.arrays[:5])
  for index in range(2):
    one = made.replace(
      k_pages=made.k_pages[index], v_pages=made.v_pages[index]
    )
    data.assert_right(one, out[index], lse[index])


@needs_interpreter
@pytest.mark.parametrize(
  "query_lengths",
  [None, pytest.param((2, 1, 3, 0, 2), marks=pytest.mark.slow)],
)
def test_batch_invariance(monkeypatch, query_lengths):
  """A sequence's bits are the same alone, in company and in another place."""
  monkeypatch.setattr(hopper_tuning, "_INVARIANT_TOKENS", 48)
  made = data.problem(
    52, lengths=(40, 129, 0, 16, 90), query_lengths=query_lengths, N=8, K=4,
    H=64, p=16, dtype=jnp.bfloat16, sinks=True,
    **({} if query_lengths is None else dict(max_query_length=3)),
  )
  out, lse = _invariant(made)
  data.assert_right(made, out, lse)
  starts = np.arange(6) if query_lengths is None else np.asarray(
    made.query_starts
  )
  for rows in ((1,), (3, 0, 2, 4, 1)):
    tokens = np.concatenate([
      np.arange(starts[b], starts[b + 1]) for b in rows
    ])
    counts = [starts[b + 1] - starts[b] for b in rows]
    part = made.replace(
      query=made.query[tokens],
      page_table=made.page_table[np.array(rows)],
      lengths=made.lengths[np.array(rows)],
      query_starts=None if query_lengths is None else jnp.asarray(
        np.cumsum([0, *counts]), jnp.int32
      ),
    )
    data.assert_same_bits(_invariant(part), (out[tokens], lse[tokens]))


def _invariant(made):
  plan = paged_jax.plan_attention(
    made.page_table, made.lengths, made.query_starts,
    num_heads=made.query.shape[1], num_kv_heads=made.k_pages.shape[1],
    head_dim=made.query.shape[2], page_size=16, dtype=jnp.bfloat16,
    max_query_length=made.static.get("max_query_length", 1),
    batch_invariant=True,
  )
  assert plan.work.config.cut == hopper_tuning.FIXED
  return data.call(made, None, plan=plan)


@needs_interpreter
@pytest.mark.parametrize(
  "changes",
  [
    dict(H=64, sinks=True),
    pytest.param(dict(H=192, sinks=True), marks=pytest.mark.slow),
    pytest.param(dict(H=64, N=128, K=1), marks=pytest.mark.slow),
  ],
)
def test_batch_invariance_wherever_cuts_fall(monkeypatch, changes):
  """Pieces are added up by one CTA, or handed over to it by others."""
  monkeypatch.setattr(hopper_tuning, "_INVARIANT_TOKENS", 16)
  settings = dict(N=4, K=2, p=16, dtype=jnp.bfloat16) | changes
  made = data.problem(61, lengths=(70, 40), **settings)
  want = _invariant(made)
  data.assert_right(made, *want)
  for num_ctas in (1, 7):
    monkeypatch.setattr(hopper, "_INTERPRETED_CTAS", num_ctas)
    data.assert_same_bits(_invariant(made), want)


@needs_interpreter
def test_slots_before_a_long_window_are_not_seen():
  """The window begins in a tile that does not hold its end."""
  made = data.problem(57, lengths=(229,), N=4, K=2, H=64, p=16,
                      dtype=jnp.bfloat16, window=100)
  page = int(made.page_table[0, 8])  # positions 128 ..; 129 are not seen
  hidden = made.replace(
    k_pages=made.k_pages.at[page, :, :1].set(jnp.inf),
    v_pages=made.v_pages.at[page, :, :1].set(jnp.inf),
  )
  data.assert_right(made, *data.call(hidden, "hopper"))


@needs_interpreter
def test_a_later_token_in_a_full_tile_is_not_seen(monkeypatch):
  """The first of three tokens has the last but one of a tile's positions."""
  monkeypatch.setattr(hopper, "_INTERPRETED_CTAS", 1)
  made = data.problem(63, lengths=(129,), query_lengths=(3,),
                      max_query_length=3, N=4, K=2, H=64, p=16,
                      dtype=jnp.bfloat16)
  page = int(made.page_table[0, 7])  # positions 112 .. 127; 127 is the second
  made = made.replace(k_pages=made.k_pages.at[page, :, 15].multiply(20))
  data.assert_right(made, *data.call(made, "hopper"))


@needs_interpreter
def test_many_pieces_are_added_up(monkeypatch):
  """21 of them, in three CTAs: 7, and 14 others."""
  monkeypatch.setattr(hopper_tuning, "_INVARIANT_TOKENS", 16)
  made = data.problem(59, lengths=(330,), N=2, K=1, H=64, p=16,
                      dtype=jnp.bfloat16, sinks=True)
  last = int(made.page_table[0, 20])  # its logits are the largest
  made = made.replace(k_pages=made.k_pages.at[last].multiply(4))
  data.assert_right(made, *_invariant(made))


def test_batch_invariance_is_for_hopper_only():
  made = data.problem(53, lengths=(3,), H=64, dtype=jnp.bfloat16)
  call = functools.partial(
    paged_jax.plan_attention, made.page_table, made.lengths,
    batch_invariant=True,
  )
  known = dict(num_heads=4, num_kv_heads=2, head_dim=64, page_size=8,
               dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match="num_heads"):
    call()
  with pytest.raises(NotImplementedError, match="xla"):
    call(**known, implementation="xla")
  with pytest.raises(ValueError, match="batch_invariant is 1"):
    call(**known | dict(batch_invariant=1))


@needs_interpreter
def test_a_batch_invariant_plan_is_for_its_implementation():
  made = data.problem(58, lengths=(3,), H=64, dtype=jnp.bfloat16)
  plan = paged_jax.plan_attention(
    made.page_table, made.lengths, num_heads=4, num_kv_heads=2, head_dim=64,
    page_size=8, dtype=jnp.bfloat16, batch_invariant=True,
  )
  with pytest.raises(ValueError, match="xla"):
    data.call(made, "xla", plan=plan)
  with pytest.raises(NotImplementedError, match="8 rows"):
    paged_jax.plan_attention(
      made.page_table, made.lengths, num_heads=4, num_kv_heads=1, head_dim=64,
      page_size=4, dtype=jnp.bfloat16, batch_invariant=True,
    )


def test_a_batch_invariant_kernel_is_the_same_for_every_batch():
  geometry = dataclasses.replace(GEOMETRY, num_heads=32, num_kv_heads=8)
  configs = {
    hopper_tuning.choose(geometry, B, M, batch_invariant=True)
    for B in (1, 9, 64, 999) for M in (1, 8, 4000)
  }
  assert len(configs) == 1
