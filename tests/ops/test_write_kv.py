"""The slot writer: the right slots, no others, and never a copy of the pool."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.ops import write_kv as write_kv_lib

L, P, K, p, H = 3, 10, 2, 4, 8  # sizes of the exhaustive tests
NULLS = (-1, -2, -P * p, P * p, P * p + 1, 2**31 - 1, -(2**31))

# On a CPU the kernel is interpreted.
each_implementation = pytest.mark.parametrize(
  "implementation", write_kv_lib.IMPLEMENTATIONS
)


def _pool(rng, *lead, dtype=np.float32):
  """Random bits, NaN and Inf among them: a copy must keep every one."""
  pool = rng.standard_normal((*lead, P, K, p, H)).astype(dtype)
  flat = pool.reshape(-1)
  flat[rng.integers(0, flat.size, 20)] = np.nan
  flat[rng.integers(0, flat.size, 20)] = -np.inf
  return pool


def _by_loop(pool, rows, slots, layer):
  """The whole pool, slot by slot."""
  pool = pool.copy()
  view = pool if layer is None else pool[layer]
  for page in range(P):
    for offset in range(p):
      for token, slot in enumerate(slots.tolist()):
        if slot == page * p + offset:
          view[page, :, offset] = rows[token]
  return pool


def _same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.dtype == b.dtype and a.shape == b.shape
  assert a.tobytes() == b.tobytes()


@each_implementation
@pytest.mark.parametrize("traced", (False, True))
@pytest.mark.parametrize("layer", (None, 0, L - 1))
def test_every_slot_against_a_loop(layer, traced, implementation):
  rng = np.random.default_rng(layer or 7)
  lead = () if layer is None else (L,)
  slots = rng.permutation(np.r_[np.arange(0, P * p, 2), NULLS])
  slots = slots.astype(np.int32)
  k_pages, v_pages = _pool(rng, *lead), _pool(rng, *lead)
  k, v = rng.standard_normal((2, len(slots), K, H)).astype(np.float32)
  write = functools.partial(
    paged_jax.write_kv, implementation=implementation
  )
  if traced:
    write = jax.jit(write)
  arrays = map(jnp.asarray, (k_pages, v_pages, k, v, slots))
  got_k, got_v = write(*arrays, layer=layer)
  _same_bits(got_k, _by_loop(k_pages, k, slots, layer))
  _same_bits(got_v, _by_loop(v_pages, v, slots, layer))


@each_implementation
@pytest.mark.parametrize("slot", range(P * p))
def test_one_token_in_each_slot(slot, implementation):
  rng = np.random.default_rng(slot)
  pool, rows = _pool(rng, L), rng.standard_normal((1, K, H), np.float32)
  slots = np.array([slot], np.int32)
  layer = slot % L
  arrays = map(jnp.asarray, (pool, pool, rows, rows, slots))
  got, _ = _WRITE(*arrays, layer, implementation)
  _same_bits(got, _by_loop(pool, rows, slots, layer))


@each_implementation
@pytest.mark.parametrize("slot", NULLS)
def test_null_slots_change_nothing(slot, implementation):
  rng = np.random.default_rng(0)
  pool = _pool(rng, L)
  rows = np.ones((1, K, H), np.float32)
  slots = np.array([slot], np.int32)
  for layer in range(L):
    arrays = map(jnp.asarray, (pool, pool, rows, rows, slots))
    got = _WRITE(*arrays, layer, implementation)
    _same_bits(got[0], pool)
    _same_bits(got[1], pool)


@each_implementation
@pytest.mark.parametrize("one_pool", (False, True))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, np.float32))
def test_slots_of_their_own_for_k_and_v(one_pool, dtype, implementation):
  rng = np.random.default_rng(1)
  order = rng.permutation(P * p).astype(np.int32)
  slots = np.stack([order[:9], order[9:18]])
  slots[0, 3], slots[1, 5] = -1, P * p
  k_pages, v_pages = _pool(rng, dtype=dtype), _pool(rng, dtype=dtype)
  k, v = rng.standard_normal((2, 9, K, H)).astype(dtype)
  got_k, got_v = paged_jax.write_kv(
    jnp.asarray(k_pages),
    None if one_pool else jnp.asarray(v_pages),
    *map(jnp.asarray, (k, v, slots)),
    implementation=implementation,
  )
  want = _by_loop(k_pages, k, slots[0], None)
  if one_pool:
    assert got_v is None
    _same_bits(got_k, _by_loop(want, v, slots[1], None))
  else:
    _same_bits(got_k, want)
    _same_bits(got_v, _by_loop(v_pages, v, slots[1], None))


@pytest.mark.parametrize("head_dim, num_kv_heads, page_size, num_tokens", (
  (80, 3, 1, 41), (128, 8, 16, 2), (256, 1, 3, 29), (64, 5, 32, 130),
))
def test_head_sizes_off_the_tile(
  head_dim, num_kv_heads, page_size, num_tokens
):
  """The kernel's tiles are powers of two, rows and heads need not be."""
  rng = np.random.default_rng(head_dim)
  num_pages = -(-num_tokens // page_size) + 2
  size = (2, num_pages, num_kv_heads, page_size, head_dim)
  slots = rng.permutation(num_pages * page_size)[:num_tokens].astype(np.int32)
  k_pages, v_pages = rng.standard_normal((2, *size)).astype(np.float16)
  k, v = rng.standard_normal((2, num_tokens, num_kv_heads, head_dim))
  k, v = k.astype(np.float16), v.astype(np.float16)
  got = _WRITE(
    *map(jnp.asarray, (k_pages, v_pages, k, v, slots)), 1, "triton"
  )
  for pool, rows, new in zip((k_pages, v_pages), (k, v), got):
    want = pool.copy()
    want[1].swapaxes(1, 2)[slots // page_size, slots % page_size] = rows
    _same_bits(new, want)


def test_a_gpu_takes_the_kernel_and_moves_on_where_it_cannot(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  names = []
  for name in write_kv_lib.IMPLEMENTATIONS:
    real = getattr(write_kv_lib, f"_{name}")

    def spy(*args, name=name, real=real):
      names.append(name)
      return real(*args)

    monkeypatch.setattr(write_kv_lib, f"_{name}", spy)
  pool = jnp.zeros((P, K, p, H))
  for num_tokens in (2, 0):  # nothing to launch for no tokens
    rows = jnp.ones((num_tokens, K, H))
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    got, _ = paged_jax.write_kv(pool, pool, rows, rows, slots, interpret=True)
    assert got.sum() == num_tokens * K * H
  assert names == ["triton", "triton", "xla"]
  with pytest.raises(NotImplementedError, match="no tokens"):
    paged_jax.write_kv(
      pool, pool, rows, rows, slots, implementation="triton", interpret=True
    )


def test_an_unknown_implementation_is_named():
  pool = jnp.zeros((P, K, p, H))
  rows, slots = jnp.zeros((1, K, H)), jnp.zeros(1, jnp.int32)
  with pytest.raises(ValueError, match="implementation is 'hopper'"):
    paged_jax.write_kv(pool, pool, rows, rows, slots, implementation="hopper")


@functools.partial(jax.jit, static_argnums=6)
def _WRITE(k_pages, v_pages, k, v, slots, layer, implementation):
  return paged_jax.write_kv(
    k_pages, v_pages, k, v, slots, layer=layer, implementation=implementation
  )


# --- in place, read off the compiled program --------------------------------

# Of an array as large as the pool, or as one layer of it, these make no copy.
_IN_PLACE = (
  "parameter",
  "bitcast",
  "get-tuple-element",
  "scatter",
  "dynamic-update-slice",
)


def _copies(function, donated, *arrays):
  """Instructions that make a new array of a pool's, or a layer's, size."""
  function = jax.jit(function, donate_argnums=tuple(range(donated)))
  text = function.lower(*arrays).compile().as_text()
  aliases = re.search(r"input_output_alias=\{(.*?) \}", text).group(1)
  assert aliases.count("alias)") == donated, aliases
  pool = arrays[0].shape
  sizes = (np.prod(pool), np.prod(pool[-4:]))
  found = []
  for line in text.splitlines():
    made = re.search(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
    if made is None:
      continue
    size = np.prod([int(x) for x in made[1].split(",")])
    # The compiler wraps the scatter in a fusion of its own, in place; a kernel
    # takes over the memory of an operand.
    in_place = made[2] == "fusion" and "scatter" in line
    in_place |= made[2] == "custom-call" and "operand_aliasing" in line
    if size in sizes and made[2] not in _IN_PLACE and not in_place:
      found.append(line.strip()[:120])
  return found


def _big(*lead):
  # Of a size that nothing else in these programs has.
  return jnp.zeros((*lead, 53, K, 16, 32))


def _rows(num_tokens=4):
  k = jnp.ones((num_tokens, K, 32))
  return k, jnp.arange(num_tokens, dtype=jnp.int32) * 17


@pytest.mark.parametrize("lead", ((), (L,)))
def test_no_copy_of_donated_pools(lead):
  k, slots = _rows()

  def write(k_pages, v_pages, k, slots, layer):
    layer = layer if lead else None
    return paged_jax.write_kv(k_pages, v_pages, k, k, slots, layer=layer)

  pools = (_big(*lead), _big(*lead))
  assert not _copies(write, 2, *pools, k, slots, jnp.int32(1))


def test_the_search_finds_a_copy():
  k, slots = _rows()

  def keeps_the_old(k_pages, k, slots):
    new, _ = paged_jax.write_kv(k_pages, k_pages, k, k, slots, layer=0)
    return new, new[1, 2] + k_pages[1, 2]

  def slices_a_layer(k_pages, k, slots):
    pages = lax.dynamic_index_in_dim(k_pages, slots[0], keepdims=False)
    pages, _ = paged_jax.write_kv(pages, pages, k, k, slots)
    return lax.dynamic_update_index_in_dim(k_pages, pages, slots[0], 0)

  assert _copies(keeps_the_old, 1, _big(L), k, slots)
  assert _copies(slices_a_layer, 1, _big(L), k, slots)


@pytest.mark.parametrize("one_pool", (False, True))
@pytest.mark.parametrize("scanned", (False, True))
@pytest.mark.parametrize("packed, B", ((False, 1), (False, 4), (True, 4)))
def test_no_copy_in_a_step_that_writes_then_attends(
  packed, B, scanned, one_pool
):
  """All layers of a step, whose queries, keys and values follow each other.

  One row is a case of its own: XLA rewrites a scatter of one token.
  """
  num_pages, layers = 53, 2
  _, slots = _rows(B)
  table = jnp.arange(B * 4, dtype=jnp.int32).reshape(B, 4)
  lengths = jnp.full((B,), 50, jnp.int32)
  ragged = {}
  if packed:
    starts = jnp.array([0, 3, 3, 4, 4], jnp.int32)
    ragged = dict(query_starts=starts, max_query_length=3)

  def layer(carry, index):
    k_pages, v_pages, x = carry
    where, pages = slots, table
    if one_pool:
      where = jnp.stack([slots, slots + 16 * num_pages // 2])
      pages = jnp.stack([table, table + num_pages // 2], axis=1)
      v_pages = None
    k_pages, v_pages = paged_jax.write_kv(
      k_pages, v_pages, x[:, :K] + 1, x[:, :K], where, layer=index
    )
    x = paged_jax.paged_attention(
      x,
      k_pages,
      v_pages,
      pages,
      lengths,
      layer=index,
      implementation="xla",
      **ragged,
    )
    return (k_pages, v_pages, x), None

  def step(k_pages, *rest):
    *v_pages, x = rest
    carry = (k_pages, v_pages[0] if v_pages else None, x)
    if scanned:
      return lax.scan(layer, carry, jnp.arange(layers))[0]
    for index in range(layers):
      carry, _ = layer(carry, index)
    return carry

  pools = (_big(layers),) if one_pool else (_big(layers), _big(layers))
  assert not _copies(step, len(pools), *pools, jnp.ones((B, 4, 32)))
