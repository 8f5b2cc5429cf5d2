"""Every argument tried wrong: the error names it, its value and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax

B, T, N, K, H, P, p, M = 2, 2, 4, 2, 8, 5, 4, 3


def i32(*values):
  return jnp.asarray(values, jnp.int32)


def arguments(**changes):
  base = dict(
    query=jnp.ones((T, N, H)),
    k_pages=jnp.ones((P, K, p, H)),
    v_pages=jnp.ones((P, K, p, H)),
    page_table=jnp.array([[0, 1, P], [2, 3, 4]], jnp.int32),
    lengths=i32(5, 12),
    implementation="reference",
  )
  return base | changes


STACKED = dict(
  k_pages=jnp.ones((3, P, K, p, H)), v_pages=jnp.ones((3, P, K, p, H))
)

# (argument changes, error message as a regular expression)
BAD_ATTENTION = {
  "query no array": (dict(query=[1.0]), r"query is a list.*\[T, N, H\]"),
  "query rank": (dict(query=jnp.ones((T, H))), r"query .*rank 2.*\[T, N, H\]"),
  "query dtype": (dict(query=jnp.ones((T, N, H), jnp.int32)),
                  r"query has dtype int32.*float32"),
  "query tokens": (dict(query=jnp.ones((3, N, H))),
                   r"T=3 tokens for B=2.*query_starts"),
  "heads": (dict(query=jnp.ones((T, 3, H))), r"N=3 heads.*multiple of K=2"),
  "head dim": (dict(query=jnp.ones((T, N, 16))), r"head dim 8.*query has 16"),
  "k rank": (dict(k_pages=jnp.ones((P, K, H))), r"k_pages .*rank 3"),
  "k dtype": (dict(k_pages=jnp.ones((P, K, p, H), jnp.bfloat16)),
              r"k_pages has dtype bfloat16.*float32.*cast"),
  "k empty": (dict(k_pages=jnp.ones((0, K, p, H))), r"k_pages .*at least 1"),
  "v rank": (dict(v_pages=jnp.ones((P, K, H))), r"v_pages .*rank 3"),
  "v shape": (dict(v_pages=jnp.ones((4, K, p, H))), r"v_pages has shape \(4"),
  "v dtype": (dict(v_pages=jnp.ones((P, K, p, H), jnp.float16)),
              r"v_pages has dtype float16"),
  "one pool, one table": (dict(v_pages=None), r"page_table .*\[B, 2, M\]"),
  "layer missing": (STACKED, r"layer is missing.*\(3, 5"),
  "layer too large": (STACKED | dict(layer=3), r"layer is 3.*L=3.*0 to 2"),
  "layer negative": (STACKED | dict(layer=i32(-1)[0]), r"layer is -1.*L=3"),
  "layer float": (STACKED | dict(layer=1.0), r"layer is 1\.0.*int"),
  "layer of one": (dict(layer=1), r"layer is 1 but k_pages has one layer"),
  "table rank": (dict(page_table=i32(1, 2)), r"page_table .*rank 1"),
  "table dtype": (dict(page_table=jnp.ones((B, M))),
                  r"page_table has dtype float32.*int32"),
  "table middle": (dict(page_table=jnp.zeros((B, 3, M), jnp.int32)),
                   r"combined table is \[B, 2, M\]"),
  "table width": (dict(page_table=jnp.zeros((B, 0), jnp.int32)),
                  r"page_table .*width M must be at least 1"),
  "table entry": (dict(page_table=jnp.full((B, M), P, jnp.int32)),
                  r"page_table entry \[0, 0\] is 5.*reserve"),
  "table negative": (dict(page_table=jnp.full((B, M), -1, jnp.int32)),
                     r"page_table entry \[0, 0\] is -1"),
  "lengths rank": (dict(lengths=jnp.ones((B, 1), jnp.int32)), r"lengths .*ran"),
  "lengths dtype": (dict(lengths=jnp.ones(B)), r"lengths has dtype float32"),
  "lengths rows": (dict(lengths=i32(1, 2, 3)), r"lengths has 3 rows.*has 2"),
  "lengths high": (dict(lengths=i32(1, 13)), r"lengths is \[1, 13\].*0\.\.12"),
  "lengths low": (dict(lengths=i32(-1, 3)), r"lengths is \[-1, 3\]"),
  "starts dtype": (dict(query_starts=jnp.ones(3)), r"query_starts has dtype"),
  "starts size": (dict(query_starts=i32(0, 2)), r"query_starts has 2.*B\+1=3"),
  "starts falling": (dict(query_starts=i32(0, 2, 1)), r"query_starts .*fall"),
  "starts high": (dict(query_starts=i32(0, 2, 9)), r"query_starts .*T=2"),
  "promise broken": (dict(query_starts=i32(0, 2, 2), max_query_length=1),
                     r"max_query_length is 1 but query_starts holds .*2"),
  "promise zero": (dict(query_starts=i32(0, 1, 2), max_query_length=0),
                   r"max_query_length is 0.*at least 1"),
  "promise alone": (dict(max_query_length=4),
                    r"max_query_length is 4 but query_starts is omitted"),
  "scale zero": (dict(scale=0.0), r"scale is 0\.0.*above 0"),
  "scale array": (dict(scale=jnp.ones(())), r"scale is .*Python number"),
  "scale nan": (dict(scale=float("nan")), r"scale is nan.*finite"),
  "causal": (dict(causal="yes"), r"causal is 'yes'.*True or False"),
  "window zero": (dict(window=0), r"window is 0.*at least 1"),
  "window float": (dict(window=2.5), r"window is 2\.5.*int"),
  "window not causal": (dict(window=4, causal=False),
                        r"window is 4 with causal=False"),
  "soft cap": (dict(soft_cap=-1.0), r"soft_cap is -1\.0.*above 0"),
  "sinks size": (dict(sinks=jnp.ones(3)), r"sinks has 3 .*N=4"),
  "sinks rank": (dict(sinks=jnp.ones((1, N))), r"sinks .*rank 2"),
  "sinks dtype": (dict(sinks=i32(1, 2, 3, 4)), r"sinks has dtype int32"),
  "implementation": (dict(implementation="cuda"), r"'cuda'.*triton.*xla"),
  "interpret": (dict(interpret="cpu"), r"interpret is 'cpu'.*None, True"),
  "plan": (dict(plan=42), r"plan is a int.*plan_attention"),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_paged_attention_names_the_bad_argument(case):
  changes, message = BAD_ATTENTION[case]
  with pytest.raises(ValueError, match=message):
    paged_jax.paged_attention(**arguments(**changes))


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_are_not_implemented(name):
  with pytest.raises(NotImplementedError, match="k_scale and v_scale"):
    paged_jax.paged_attention(**arguments(**{name: jnp.ones(K)}))


def test_slots_of_a_pool_must_be_int32():
  pool = jax.ShapeDtypeStruct((2**29, 1, 4, 1), jnp.float32)
  query = jnp.ones((T, 1, 1))
  with pytest.raises(ValueError, match=r"P=536870912 pages of p=4.*int32"):
    jax.eval_shape(
      lambda k, v: paged_jax.paged_attention(
        **arguments(query=query, k_pages=k, v_pages=v)
      ),
      pool,
      pool,
    )


def test_shapes_are_checked_under_jit_and_values_are_not():
  run = jax.jit(lambda kwargs: paged_jax.paged_attention(
    **kwargs, implementation="reference"))
  given = arguments()
  given.pop("implementation")
  with pytest.raises(ValueError, match="lengths has 3 rows"):
    run(given | dict(lengths=i32(1, 2, 3)))
  out = run(given | dict(lengths=i32(1, 13)))  # longer than the row's pages
  assert out.shape == (T, N, H)


def test_pages_before_the_window_may_be_null():
  table = jnp.array([[P, P, 1], [P, 3, 4]], jnp.int32)
  out = paged_jax.paged_attention(
    **arguments(page_table=table, lengths=i32(12, 12), window=4)
  )
  assert np.isfinite(np.asarray(out)).all()


BAD_WRITE = {
  "k_pages rank": (dict(k_pages=jnp.ones((P, p, H))), r"k_pages .*rank 3"),
  "k_pages dtype": (dict(k_pages=jnp.ones((P, K, p, H), jnp.int8)),
                    r"k_pages has dtype int8"),
  "v_pages shape": (dict(v_pages=jnp.ones((4, K, p, H))),
                    r"v_pages is float32\(4, 2, 4, 8\).*both pools"),
  "k shape": (dict(k=jnp.ones((T, K, 4))), r"k has shape .*K=2, H=8"),
  "k rank": (dict(k=jnp.ones((K, H))), r"k .*rank 2.*\[T, K, H\]"),
  "k dtype": (dict(k=jnp.ones((T, K, H), jnp.bfloat16)),
              r"k has dtype bfloat16.*astype"),
  "v shape": (dict(v=jnp.ones((T, 3, H))), r"v has shape \(2, 3, 8\)"),
  "v dtype": (dict(v=jnp.ones((T, K, H), jnp.float16)), r"v has dtype float16"),
  "v tokens": (dict(v=jnp.ones((3, K, H))), r"v has shape \(3.*as many values"),
  "slots dtype": (dict(slots=jnp.ones(T)), r"slots has dtype float"),
  "slots size": (dict(slots=i32(0)), r"slots has 1 entries for T=2"),
  "slots rank": (dict(slots=jnp.zeros((2, 2, 2), jnp.int32)), r"slots .*rank"),
  "slots rows": (dict(slots=jnp.zeros((3, 2), jnp.int32)),
                 r"slots has shape \(3, 2\).*\[2, T\]"),
  "one pool, one row": (dict(v_pages=None), r"slots .*\[2, T\]"),
  "layer missing": (STACKED, r"layer is missing"),
  "layer range": (STACKED | dict(layer=-1), r"layer is -1.*L=3"),
  "layer of one": (dict(layer=0), r"layer is 0 but k_pages has one layer"),
}


@pytest.mark.parametrize("case", BAD_WRITE)
def test_write_kv_names_the_bad_argument(case):
  changes, message = BAD_WRITE[case]
  base = dict(
    k_pages=jnp.ones((P, K, p, H)),
    v_pages=jnp.ones((P, K, p, H)),
    k=jnp.ones((T, K, H)),
    v=jnp.ones((T, K, H)),
    slots=i32(0, 1),
  )
  with pytest.raises(ValueError, match=message):
    paged_jax.write_kv(**(base | changes))


BAD_PLAN = {
  "table rank": (dict(page_table=i32(1)), r"page_table .*rank 1"),
  "table dtype": (dict(page_table=jnp.ones((B, M))), r"page_table has dtype"),
  "lengths": (dict(lengths=jnp.ones(B)), r"lengths has dtype float32"),
  "starts": (dict(query_starts=jnp.ones(B)), r"query_starts has dtype"),
  "starts size": (dict(query_starts=i32(0, 2)), r"query_starts has 2 .*B\+1"),
  "rows": (dict(lengths=i32(1, 2, 3)), r"lengths has 3 rows.*has 2"),
  "heads": (dict(num_heads=3, num_kv_heads=2), r"num_heads is 3.*multiple"),
  "num_heads": (dict(num_heads=0), r"num_heads is 0.*at least 1"),
  "num_kv_heads": (dict(num_kv_heads=2.0), r"num_kv_heads is 2\.0.*int"),
  "head_dim": (dict(head_dim=-8), r"head_dim is -8"),
  "page_size": (dict(page_size="16"), r"page_size is '16'"),
  "promise": (dict(max_query_length=0, query_starts=i32(0, 1, 2)),
              r"max_query_length is 0"),
  "window": (dict(window=0), r"window is 0"),
  "causal": (dict(causal="x"), r"causal is 'x'"),
  "not causal": (dict(causal=False, window=4), r"window is 4 with causal=Fal"),
  "dtype": (
    dict(num_heads=2, num_kv_heads=1, head_dim=8, page_size=4, dtype="float7"),
    r"dtype is 'float7'",
  ),
  "num_tokens": (dict(num_tokens=-1), r"num_tokens is -1"),
  "batch_invariant": (dict(batch_invariant=1), r"batch_invariant is 1"),
  "shared_prefix": (dict(shared_prefix="no"), r"shared_prefix is 'no'"),
  "memory_order": (dict(memory_order=0), r"memory_order is 0"),
  "implementation": (dict(implementation="fast"), r"'fast'.*xla"),
}


@pytest.mark.parametrize("case", BAD_PLAN)
def test_plan_attention_names_the_bad_argument(case):
  changes, message = BAD_PLAN[case]
  given = arguments()
  base = {name: given[name] for name in ("page_table", "lengths")}
  with pytest.raises(ValueError, match=message):
    paged_jax.plan_attention(**(base | changes))


def test_a_stale_plan_is_caught():
  given = arguments()
  plan = paged_jax.plan_attention(given["page_table"], given["lengths"])
  paged_jax.paged_attention(**given, plan=plan)
  for name, value in (
    ("lengths", i32(6, 12)),
    ("page_table", jnp.array([[1, 0, P], [2, 3, 4]], jnp.int32)),
  ):
    with pytest.raises(ValueError, match=f"plan is stale: {name}"):
      paged_jax.paged_attention(**(given | {name: value}), plan=plan)
  with pytest.raises(ValueError, match="plan was made without query_starts"):
    paged_jax.paged_attention(
      **given, query_starts=i32(0, 1, 2), plan=plan
    )
  short = paged_jax.plan_attention(
    given["page_table"], given["lengths"], num_tokens=1
  )
  with pytest.raises(ValueError, match="num_tokens=1 but query has T=2"):
    paged_jax.paged_attention(**given, plan=short)
  wider = jnp.concatenate([given["page_table"]] * 2, axis=1)
  with pytest.raises(ValueError, match="plan was made for page_table of shape"):
    paged_jax.paged_attention(**(given | dict(page_table=wider)), plan=plan)


def test_a_named_implementation_runs_or_raises():
  with jax.enable_x64(True):
    wide = {
      name: jnp.asarray(np.ones(value.shape), jnp.float64)
      for name, value in arguments().items()
      if name in ("query", "k_pages", "v_pages")
    }
    with pytest.raises(NotImplementedError, match="triton"):
      paged_jax.paged_attention(
        **arguments(**wide, implementation="triton"), interpret=True
      )


def test_a_plan_of_another_geometry_is_refused():
  """By implementations too that make no work of their own."""
  given = arguments()
  known = dict(
    num_heads=N, num_kv_heads=K, head_dim=H, page_size=p, dtype="float32"
  )
  for name, wrong in dict(num_heads=2 * N, page_size=2 * p, window=3).items():
    plan = paged_jax.plan_attention(
      given["page_table"], given["lengths"], **known | {name: wrong}
    )
    with pytest.raises(ValueError, match=f"plan was made for {name}={wrong}"):
      paged_jax.paged_attention(**given, plan=plan)
