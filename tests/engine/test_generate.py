"""Generation through pages against the same model over an ordinary cache."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax.engine import generate, sampling, steps
from paged_jax.models import contiguous, huggingface
from tests.models import checkpoints

_NEW = 8  # tokens to generate
# 3 rows of up to 10 pages over 17: oversubscribed, and just enough here.
_SIZES = dict(num_pages=17, page_size=4, num_sequences=3, max_pages=10)


@pytest.fixture(scope="module")
def model():
  # An untied head: with a tied one a random model repeats its input.
  config = checkpoints.variant("llama3")
  return huggingface.from_tensors(config, checkpoints.random_tensors(config))


@pytest.fixture(scope="module")
def prompts(model):
  rng = np.random.default_rng(0)
  return [rng.integers(0, model.config.vocab_size, n) for n in (5, 1, 19)]


@pytest.fixture(scope="module")
def expected(model, prompts):
  """Greedy tokens of the whole sequence run anew for every token."""
  forward = jax.jit(contiguous.forward)
  tokens = np.zeros((len(prompts), 32), np.int32)
  lengths = np.array([len(p) for p in prompts])
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  rows = np.arange(len(prompts))
  for i in range(_NEW):
    logits = np.asarray(forward(model, tokens))
    tokens[rows, lengths + i] = logits[rows, lengths + i - 1].argmax(-1)
  result = [tuple(t[n : n + _NEW].tolist()) for t, n in zip(tokens, lengths)]
  assert all(len(set(row)) > _NEW // 2 for row in result), "too plain a model"
  return result


@pytest.fixture(scope="module")
def generator(model):
  return generate.Generator(
    model, **_SIZES, prefill_tokens=16, implementation="reference"
  )


def _tokens(completions):
  return [c.tokens for c in completions]


@pytest.mark.parametrize("permute_seed", [None, 3])
def test_tokens_of_ragged_batch(generator, prompts, expected, permute_seed):
  pages = []
  got = generator.generate(
    prompts,
    max_new_tokens=_NEW,
    permute_seed=permute_seed,
    on_step=lambda record: pages.append(np.asarray(record.table.pages)),
  )
  assert _tokens(got) == expected
  assert {c.finished_by for c in got} == {"length"}
  assert generator.table.num_free == generator.table.num_pages
  paged_jax.check_invariants(generator.table)
  if permute_seed is not None:
    row = pages[0][2]
    assert (np.diff(row[row < generator.table.num_pages]) < 0).any()


def test_eos_ends_a_row_alone(generator, prompts, expected):
  eos = expected[0][2]
  got = generator.generate(prompts, max_new_tokens=_NEW, eos=[eos])
  for tokens, completion in zip(expected, got):
    end = tokens.index(eos) + 1 if eos in tokens else _NEW
    assert completion.tokens == tokens[:end]
    assert completion.finished_by == ("eos" if eos in tokens else "length")


def test_steps_are_told(generator, prompts, expected):
  records = []
  generator.generate(
    prompts, max_new_tokens=_NEW, permute_seed=5, on_step=records.append
  )
  p, null = generator.table.page_size, generator.table.null
  prefills = [r for r in records if r.kind == "prefill"]
  assert [int(r.num_tokens.sum()) for r in prefills] == [16, 9]
  assert len(records) == 2 + _NEW - 1  # prefill gives the first token
  written = {}  # slot -> (row, position)
  for record in records:
    # Row of every packed token; a decode step has one token a row.
    if record.kind == "prefill":
      rows = np.repeat(np.arange(3), record.num_tokens)
    else:
      rows = np.arange(3)
    pages = np.asarray(record.table.pages)
    positions = np.asarray(record.output.positions)
    slots = np.asarray(record.output.slots)
    for b, position, slot in zip(rows, positions, slots):
      if not record.num_tokens[b]:
        assert slot == null * p
        continue
      assert slot == pages[b, position // p] * p + position % p
      assert written.setdefault(slot, (b, position)) == (b, position)
  counts = [len(prompt) + _NEW - 1 for prompt in prompts]
  assert sorted(written.values()) == [
    (b, i) for b, count in enumerate(counts) for i in range(count)
  ]


def test_rows_wait_for_pages(model, prompts, expected):
  # 7 pages hold the long row alone (26 of 28 tokens), not two rows.
  small = generate.Generator(
    model,
    **_SIZES | dict(num_pages=7),
    prefill_tokens=16,
    implementation="reference",
  )
  got = small.generate(prompts[:2], max_new_tokens=_NEW)
  assert _tokens(got) == expected[:2]
  for order in ([2, 0], [0, 2], [2, 2, 0], [1, 2, 0]):
    got = small.generate([prompts[i] for i in order], max_new_tokens=_NEW)
    assert _tokens(got) == [expected[i] for i in order]
  with pytest.raises(RuntimeError, match="num_pages is 7"):
    small.generate([prompts[0], prompts[2]], max_new_tokens=20)
  # The failure left nothing behind.
  got = small.generate(prompts[:2], max_new_tokens=_NEW)
  assert _tokens(got) == expected[:2]


def test_combined_table(model, prompts, expected):
  combined = generate.Generator(
    model, **_SIZES | dict(num_pages=34), combined=True,
    implementation="reference",
  )
  got = combined.generate(prompts, max_new_tokens=_NEW, permute_seed=1)
  assert _tokens(got) == expected


def test_interpreted_kernels(model, prompts, expected):
  kernels = generate.Generator(
    model, **_SIZES, implementation="triton", interpret=True
  )
  got = kernels.generate(prompts, max_new_tokens=_NEW + 1, permute_seed=2)
  assert [c.tokens[:_NEW] for c in got] == expected


def test_nothing_recompiles_and_draws_follow_the_seed(
  model, prompts, monkeypatch
):
  for name in ("prefill", "decode"):
    step = chex.assert_max_traces(getattr(steps, name), n=1)
    monkeypatch.setattr(steps, name, step)
  generator = generate.Generator(
    model,
    **_SIZES,
    prefill_tokens=16,
    sampling=sampling.Sampling(temperature=1.0, top_k=20, top_p=0.95),
    implementation="reference",
  )
  first, again, other = (
    _tokens(generator.generate(prompts, max_new_tokens=_NEW, seed=seed))
    for seed in (0, 0, 1)
  )
  assert first == again
  assert first != other
  generator.generate(prompts[:2], max_new_tokens=5, permute_seed=0)
  generator.generate(prompts[1:], max_new_tokens=2, eos=[7])


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("implementation", ["xla"])
def test_no_step_copies_the_pool(model, kind, implementation):
  generator = generate.Generator(
    model, **_SIZES, implementation=implementation
  )
  cache = generator._cache
  count = jnp.ones(3, jnp.int32 if kind == "prefill" else bool)
  tokens = jnp.zeros(16 if kind == "prefill" else 3, jnp.int32)
  compiled = getattr(generator, kind).lower(
    generator._weights,
    cache,
    generator.table,
    tokens,
    count,
    jax.random.key(0),
  ).compile()
  text = compiled.as_text()
  shape = ",".join(map(str, cache.k_pages.shape))
  assert f"f32[{shape}]" in text
  assert not re.findall(rf"f32\[{shape}\]\S* copy\(", text)
  # Both pools come back in the memory they came in.
  aliased = compiled.memory_analysis().alias_size_in_bytes
  assert aliased >= cache.num_bytes


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompts=[]), "prompts has 0"),
    (dict(prompts=[[1]] * 4), "prompts has 4"),
    (dict(prompts=[[1], []]), r"prompts\[1\] has 0"),
    (dict(prompts=[[1] * 34]), r"prompts\[0\] has 34 .*max_pages"),
    (dict(prompts=[[96]]), "ids 96"),
    (dict(prompts=["ab"]), r"prompts\[0\] is 'ab'.*token ids"),
    (dict(prompts=[[1.5]]), r"prompts\[0\] is \[1\.5\]"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    (dict(eos=2), "eos is 2"),
  ],
)
def test_bad_input(generator, change, message):
  arguments = dict(prompts=[[1, 2]], max_new_tokens=8) | change
  with pytest.raises(ValueError, match=message):
    generator.generate(**arguments)


def test_plan_options_reach_every_step(model):
  generator = generate.Generator(
    model, **_SIZES, plan_options=("batch_invariant",), implementation="xla"
  )
  with pytest.raises(NotImplementedError, match="batch_invariant with"):
    generator.generate([[1, 2]], max_new_tokens=2)
  B = _SIZES["num_sequences"]
  with pytest.raises(NotImplementedError, match="batch_invariant with"):
    generator.decode(
      generator._weights,
      generator._cache,
      generator.table,
      jnp.zeros(B, jnp.int32),
      jnp.ones(B, bool),
      jax.random.key(0),
    )
  with pytest.raises(ValueError, match="plan_options is"):
    generate.Generator(model, **_SIZES, plan_options="memory_order")
