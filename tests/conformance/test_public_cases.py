"""The public cases that fit a CPU, on every implementation.

float32 is held to each case's own tolerance; half precision to the error rule
(a published tolerance cannot hold for outputs rounded to the dtype).
"""

from importlib import resources
import json
import types

import numpy as np
import pytest

from tests.conformance import data

_FILE = resources.files("paged_jax.data") / "public_cases.json"
CASES = {
  id_: types.SimpleNamespace(**case)
  for id_, case in json.loads(_FILE.read_text())["cases"].items()
  if case["size"] == "cpu"
}


def _problem(case, seed, *, lengths, query_lengths=None):
  return data.problem(
    seed,
    lengths=lengths,
    query_lengths=query_lengths,
    N=case.query_heads,
    K=case.kv_heads,
    H=case.head_dim,
    p=case.page_size,
    M=case.table_width,
    dtype=case.dtype,
  )


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("id_", CASES)
def test_case(id_, implementation):
  case = CASES[id_]
  contexts = case.contexts
  lengths = tuple(contexts[b % len(contexts)] for b in range(case.batch))
  runs = [_problem(case, 0, lengths=lengths)]
  if hasattr(case, "decode_steps"):  # a prompt, then single tokens behind it
    (prompt,) = lengths
    runs = [_problem(case, 1, lengths=lengths, query_lengths=lengths)]
    runs += [
      _problem(case, 2 + step, lengths=(prompt + step + 1,))
      for step in range(case.decode_steps)
    ]
  for made in runs:
    out, lse = data.call(made, implementation)
    if case.dtype == "float32":
      want, _ = data.expected(made)
      assert out.shape == want.shape
      np.testing.assert_allclose(
        np.asarray(out, np.float64), want, atol=case.atol, rtol=case.rtol
      )
    data.assert_right(made, out, lse)
