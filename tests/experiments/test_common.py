"""Shapes, data, checking and records that experiments share."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import (
  bench,
  bench_plot,
  captured,
  ceilings,
  cells,
  programs,
  records,
  shapes,
  timing,
  verify,
)
from experiments.common import problem as problem_lib
from paged_jax.models import config as config_lib
from paged_jax.models.transformer import Transformer
from paged_jax.ops import api, write_kv
from paged_jax.ops import plan as plan_lib


def _shape(**changes):
  fields = dict(
    name="test", phase="prefill", batch=3, num_heads=4, num_kv_heads=2,
    head_dim=16, page_size=4, context=21, distribution="ragged",
    query_tokens=5, dtype="float32", seed=3,
  )
  return shapes.Shape(**{**fields, **changes})


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("query_tokens", [0, 1, 5])
def test_bytes_and_flops_count_what_the_mask_lets_through(
  window, query_tokens
):
  shape = _shape(window=window, query_tokens=query_tokens)
  pairs = tokens = pages = 0
  for length, new in zip(shape.lengths, shape.query_lengths):
    seen = set()
    for position in range(length - new, length):
      first = 0 if window is None else max(0, position - window + 1)
      mine = range(first, position + 1)
      pairs += len(mine)
      seen |= set(mine)
    tokens += len(seen)
    pages += -(-length // 4)
  assert shape.flops == 4 * 4 * 16 * pairs
  q = shape.num_tokens * 4 * 16 * 4
  assert shape.bytes == 2 * tokens * 2 * 16 * 4 + 2 * q + 4 * pages


def test_stored_shapes_have_peers_and_ragged_lengths_of_their_size():
  known = shapes.named()
  assert len(known) > 20
  lognormal = known["llama3-8b_dec_b64_c8192_p16_lognormal"]
  # 170.3 us at 2738 GB/s were measured on the lengths this seed stands for.
  assert lognormal.bytes == pytest.approx(170.3e-6 * 2738e9, rel=2e-3)


def test_a_problem_is_permuted_poisoned_and_whole():
  shape = _shape()
  source = problem_lib.RandomSource(7)
  problem = problem_lib.build(shape, layers=2, source=source)
  table = np.asarray(problem.page_table)
  owned = table[table < problem_lib.num_pages(shape)]
  assert len(set(owned)) == len(owned) == shape.pages.sum()
  assert (np.diff(owned) < 0).any()
  for layer in range(2):
    k, v = source.keys_values(shape, layer)
    for pool, tokens in ((problem.k_pages, k), (problem.v_pages, v)):
      flat = np.asarray(pool[layer]).swapaxes(1, 2).reshape(-1, 2, 16)
      where = problem_lib.slots(shape, table)
      np.testing.assert_array_equal(flat[where], tokens)
      dead = np.delete(flat, where, axis=0)
      assert dead.size and np.isnan(dead).all()


@pytest.mark.parametrize(
  "changes",
  [
    dict(window=6, sinks=True),
    dict(soft_cap=5.0, query_tokens=0),
    dict(phase="decode", query_tokens=1),
  ],
)
def test_the_naive_attention_is_attention(changes):
  shape = _shape(**changes)
  problem = problem_lib.build(
    shape, layers=1, source=problem_lib.RandomSource(1)
  )
  with verify.precision("float64"):
    want = verify.exact(shape, "float64")(problem.state, problem.query)
    assert want.dtype == "float64"
  out = verify.naive(shape)(
    problem.query, problem.k, problem.v, problem.sinks
  )
  assert verify.check(out, want, None, shape).passed


def test_check_fails_what_is_wrong():
  shape = _shape()
  rng = np.random.default_rng(0)
  want = jnp.asarray(rng.standard_normal((shape.num_tokens, 4, 16)), "float32")
  check = lambda out: verify.check(out, want, None, shape)
  assert check(want).passed and check(want).max_error == 0
  assert check(want * (1 + 5e-6)).passed
  assert not check(want * (1 + 3e-5)).passed
  assert "NaN" in check(want.at[0, 1, 2].set(jnp.nan)).problem
  assert "NaN or Inf" in check(want.at[0, 1, 2].set(jnp.inf)).problem
  assert "shape" in check(want[1:]).problem
  assert "dtype" in check(want.astype("bfloat16")).problem
  nan = verify.check(want, want.at[0, 0, 0].set(jnp.nan), None, shape)
  assert not nan.passed  # a broken reference proves nothing


def test_half_precision_is_held_to_what_the_dtype_costs():
  shape = dataclasses.replace(_shape(), dtype="bfloat16")
  rng = np.random.default_rng(0)
  want = jnp.asarray(rng.standard_normal((shape.num_tokens, 4, 16)), "float32")
  rounded = want.astype("bfloat16")
  assert verify.check(rounded, want, rounded, shape).passed
  off = (want * 1.02).astype("bfloat16")
  assert not verify.check(off, want, rounded, shape).passed
  nan = rounded.at[0, 0, 0].set(jnp.nan)
  assert not verify.check(rounded, want, nan, shape).passed


def test_long_prompts_are_checked_in_blocks(monkeypatch):
  monkeypatch.setattr(verify, "_QUERY_BLOCK", 4)
  monkeypatch.setattr(verify, "_MOST_BLOCKS", 5)
  verify.blocks.cache_clear()
  shape = _shape(
    name="blocks", batch=2, context=50, query_tokens=37, window=9,
    dtype="bfloat16",
  )
  some = verify.blocks(shape)
  assert len(some.rows) == 5 and len(some.tokens) < shape.num_tokens
  assert some.tokens[0] == 0 and some.tokens[-1] == shape.num_tokens - 1
  problem = problem_lib.build(
    shape, layers=1, source=problem_lib.RandomSource(1)
  )
  state, query = problem.state, problem.query
  with verify.precision("float64"):
    want = verify.exact(shape, "float64")(state, query)
  rounded = verify.naive(shape)(query, problem.k, problem.v, problem.sinks)
  out = programs.ours(shape, "xla")(state)(query, 0)
  verdict = verify.check(out, want, rounded, shape)
  assert verdict.passed, verdict
  assert verdict.checked_tokens == len(some.tokens)
  at = some.tokens[6]
  wrong = verify.check(out.at[at].add(0.1), want, rounded, shape)
  assert not wrong.passed
  unseen = np.setdiff1d(np.arange(shape.num_tokens), some.tokens)[3]
  nan = verify.check(out.at[unseen, 1, 2].set(jnp.nan), want, rounded, shape)
  assert f"the first at [{unseen}, 1, 2]" in nan.problem
  verify.blocks.cache_clear()


@pytest.mark.parametrize("changes", [
  dict(phase="mixed", runs=((1, 21, 13), (2, 9, 1)), context=21),
  dict(phase="shared", shared_prefix=12, query_tokens=1, distribution="const"),
])
def test_rows_that_differ_and_rows_that_begin_alike(changes):
  shape = _shape(**changes)
  problem = problem_lib.build(
    shape, layers=1, source=problem_lib.RandomSource(1)
  )
  table = np.asarray(problem.page_table)
  total = problem_lib.num_pages(shape)
  used = len(np.unique(table[table < total]))
  if shape.shared_prefix:
    assert shape.decode
    assert (table[:, :3] == table[0, :3]).all()
    assert used == shape.pages.sum() - 2 * 3
    kv_bytes = (12 + 3 * 9) * 2 * 2 * 16 * 4
  else:
    assert not shape.decode
    assert shape.query_lengths.tolist() == [13, 1, 1]
    assert used == shape.pages.sum() == 12
    kv_bytes = (21 + 2 * 9) * 2 * 2 * 16 * 4
  assert shape.kv_bytes == kv_bytes
  with verify.precision("float64"):
    want = verify.exact(shape, "float64")(problem.state, problem.query)
  naive = verify.naive(shape)(
    problem.query, problem.k, problem.v, problem.sinks
  )
  out = programs.ours(shape, "xla")(problem.state)(problem.query, 0)
  for got in (naive, out):
    assert verify.check(got, want, None, shape).passed


@pytest.mark.parametrize("changes, match", [
  (dict(runs=((1, 21, 13),)), "batch is 3"),
  (dict(shared_prefix=6), "whole pages of 4"),
])
def test_shapes_that_contradict_themselves(changes, match):
  with pytest.raises(ValueError, match=match):
    _shape(**changes)


def test_records_survive_a_cut_line(tmp_path):
  book = records.Records(tmp_path / "rows.jsonl")
  book.append(dict(key="a", status="failed"))
  with book.path.open("a") as file:
    file.write('{"key": "b", "sta')
  book.append(dict(key="a", status="ok"))
  book.append(dict(key="c", status="wrong"))
  assert [row["key"] for row in book.rows()] == ["a", "c"]
  assert book.finished() == {"a"}


def test_a_fresh_file_keeps_the_older_one(tmp_path, capsys):
  path = tmp_path / "qwen2.5-0.5b.jsonl"
  for text in ("one\n", "two\n", "three\n"):
    with records.fresh(path) as file:
      file.write(text)
  assert path.read_text() == "three\n"
  older = [tmp_path / f"qwen2.5-0.5b.{n}.jsonl" for n in (1, 2)]
  assert [x.read_text() for x in older] == ["one\n", "two\n"]
  told = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
  assert told == list(map(str, older))


def _effort():
  return cells.Effort(
    steps=1, cold_bytes=0, seconds=0.0, repeats=2, ahead=1, most_layers=1
  )


def test_long_layers_get_short_programs_that_visit_all_of_the_pool():
  shape = _shape(batch=1, context=4096)
  effort = dataclasses.replace(
    _effort(), steps=8, most_layers=8, cold_bytes=10**9
  )
  assert effort.of(10.0) == effort
  long = effort.of(12e3)
  assert (long.steps, long.layers(shape)) == (2, 2)
  assert not long.takes_first(shape)
  assert (effort.of(500.0).steps, effort.of(500.0, cool=True).steps) == (8, 6)


def test_what_multiplies_much_is_timed_cool():
  limits = ceilings.Ceilings(
    read_gbps=3000.0, copy_gbps=3000.0, matmul_tflops=800.0
  )
  for reading, multiplying, heats in ((100, 200, 1), (100, 51, 1), (99, 49, 0)):
    num_bytes, flops = int(3e6 * reading), int(8e8 * multiplying)
    assert limits.heats(num_bytes, flops) == bool(heats)
    longer = "read" if reading > multiplying else "matmul"
    assert limits.bound_by(num_bytes, flops) == longer


def test_bench_compares_in_one_run():
  (name,) = bench.select(["cpu_tiny"])
  limits = ceilings.Ceilings(
    read_gbps=10.0, copy_gbps=5.0, matmul_tflops=0.1
  )
  ((_, rows),) = bench.run(
    [shapes.named()[name]], ["xla", "dense", "cudnn"],
    ceilings=dict(float32=limits), efforts=dict(decode=_effort()), seed=0,
  )
  ours, dense, cudnn = rows
  assert ours["status"] == dense["status"] == "ok", rows
  assert dense["ratio_to_first"] == pytest.approx(
    dense["median_us"] / ours["median_us"]
  )
  assert cudnn["status"] == "unsupported"
  text = bench.table(shapes.named()[name], rows)
  assert "dense" in text and "cudnn cannot do" in text


def test_bench_writes_where_the_slots_say(monkeypatch):
  shape = _shape(phase="write", name="w")
  limits = ceilings.Ceilings(
    read_gbps=10.0, copy_gbps=5.0, matmul_tflops=0.1
  )
  run = lambda: next(bench.run(
    [shape], ["xla", "triton", "dense"], ceilings=dict(float32=limits),
    efforts=dict(write=_effort()), seed=0,
  ))[1]
  xla, triton, dense = run()
  assert xla["status"] == triton["status"] == "ok", (xla, triton)
  assert xla["median_us"] and "median_us" not in triton  # interpreted
  assert dense["status"] == "unsupported"
  assert xla["bytes"] == 4 * shape.num_tokens * 2 * 16 * 4
  assert "w" in bench.table(shape, [xla, triton, dense])
  write = write_kv.write_kv
  monkeypatch.setattr(
    write_kv, "write_kv",
    lambda k_pages, v_pages, k, v, slots, **rest: write(
      k_pages, v_pages, k, v, slots + 1, **rest
    ),
  )
  assert run()[0]["status"] == "wrong"


def test_mixed_is_held_against_its_parts_and_plots_are_drawn(tmp_path):
  row = lambda name, us: dict(
    name=name, implementation="hopper", median_us=us, phase="mixed",
    num_kv_tokens=9, ceiling_fraction=0.5, limit_us=1.0, best_peer_us=2.0,
    tflops=5.0, flops=10**7, matmul_tflops=800.0, device="some",
  )
  names = bench.select(["mixed"])
  assert len(names) == 3
  rows = [row(name, us) for name, us in zip(names, (60.0, 30.0, 20.0))]
  assert "1.200 of the sum" in bench.sums_of_parts(rows)
  assert not bench.sums_of_parts(rows[1:])
  (path,) = bench_plot.plot(rows, tmp_path)
  assert path.stat().st_size > 5000
  decode = [row | dict(phase="decode") for row in rows]
  assert len(bench_plot.plot(rows + decode, tmp_path)) == 2


@pytest.mark.parametrize("work", (0.0002, 0.004, 0.1))
def test_a_gpu_is_timed_by_its_pace(monkeypatch, work):
  """Whatever dispatch and wake-up cost does not count, while a GPU is busy."""
  now, free, dispatch, wake = [0.0], [0.0], 0.0001, 0.001
  monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

  def wait(outputs):
    for done in np.ravel(outputs):
      if done > now[0]:
        now[0] = done + wake

  def call():
    now[0] += dispatch
    free[0] = max(free[0], now[0]) + work
    return [free[0]]

  monkeypatch.setattr(timing.jax, "block_until_ready", wait)
  got = timing.wall(dict(a=call), steps=8, repeats=3, seconds=0.0)["a"]
  assert got.median_us == pytest.approx(1e6 * work / 8, rel=0.02)


def test_options_are_the_switches_of_plan_attention():
  parameters = inspect.signature(api.plan_attention).parameters
  switches = {name for name, x in parameters.items() if x.default is False}
  assert set(plan_lib.OPTIONS) == switches


def test_bench_names_are_checked():
  assert len(bench.select(["all", "decode"])) == len(bench.select(["all"]))
  with pytest.raises(ValueError, match='did you mean "cpu_tiny"'):
    bench.select(["cpu_tinny"])
  with pytest.raises(ValueError, match='did you mean "dense"'):
    bench.check_names(["xla", "dnese"])
  names = ["xla", "hopper+memory_order", "xla+batch_invariant+shared_prefix"]
  assert bench.check_names([*names, "xla"]) == names


@pytest.mark.parametrize("name, message", [
  ("xla+nope", "'xla\\+nope': after a \\+ pass batch_invariant, shared"),
  ("xla+window", "after a \\+ pass"),  # of plan_attention, but no switch
  ("hopper+memory_ordr", 'did you mean "memory_order"'),
  ("dense+memory_order", "dense makes no plan"),
])
def test_options_of_bench_names_are_checked(name, message):
  with pytest.raises(ValueError, match=message):
    bench.check_names(["xla", name])


def test_captured_tensors_are_causal_and_packed_by_row():
  from flax import nnx

  model = Transformer(config_lib.named("tiny"), rngs=nnx.Rngs(0))
  windows = np.random.default_rng(0).integers(0, 512, (2, 9))
  whole = captured.capture(model, windows, [0, 1])
  part = captured.capture(model, windows[:, :5], [0, 1])
  for name in ("q", "k", "v"):
    for a, b in zip(getattr(whole, name), getattr(part, name)):
      np.testing.assert_allclose(a[:, :5], b, atol=1e-5)
  assert not np.allclose(whole.k[0], whole.k[1])
  shape = _shape(
    batch=2, context=9, phase="decode", query_tokens=1, num_heads=4
  )
  n = shape.lengths
  np.testing.assert_array_equal(
    whole.query(shape), [whole.q[0][0, n[0] - 1], whole.q[0][1, n[1] - 1]]
  )
  k, _ = whole.keys_values(shape, 3)
  np.testing.assert_array_equal(k[n[0]:], whole.k[1][1, : n[1]])


def test_timing_summarises_by_quartiles():
  got = timing.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
  assert (got.median_us, got.iqr_us, got.repeats) == (3.0, 2.0, 5)
  calls = []
  wall = timing.wall(
    {"a": lambda: calls.append("a") or jnp.ones(1),
     "b": lambda: calls.append("b") or jnp.ones(1)},
    repeats=3, seconds=0.0,
  )
  assert calls == ["a", "b"] * 3 and wall["a"].repeats == 3
  assert timing.kernels(lambda: jnp.ones(1)) is None
