"""The compiled programs of a cell: what is checked is what is timed.

A program runs `steps` attention layers, one after another, each on the output
of the one before, over L layers of one pool with one page table and one plan:
what a decoder feels, without its matmuls. The pool is larger than the caches,
so no layer finds its pages there. The first layer's output is returned too
and held against the reference.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.common import shapes
from paged_jax.ops import api

# What a layer does: (query, layer) -> output, both [T, N, H].
Attend = Callable[[Float[Array, "T N H"], int], Float[Array, "T N H"]]


def ours(
  shape: shapes.Shape,
  implementation: str,
  interpret: bool | None = None,
  replan: Callable[[Any], Any] | None = None,
) -> Callable[[Any], Attend]:
  """Returns state -> attend for an implementation of `paged_attention`.

  Args:
    shape: the call.
    implementation: its name, or "name+option" where the plan is to be made
      with `option=True`, one of `plan.OPTIONS`, as in "hopper+batch_invariant".
    interpret: as in `paged_attention`.
    replan: plan -> the plan to be used in its place.
  """
  implementation, *options = implementation.split("+")

  def prepare(state) -> Attend:
    decode = shape.decode
    longest = None if decode else int(shape.query_lengths.max())
    plan = api.plan_attention(
      state["page_table"],
      state["lengths"],
      None if decode else state["query_starts"],
      num_heads=shape.num_heads,
      num_kv_heads=shape.num_kv_heads,
      head_dim=shape.head_dim,
      page_size=shape.page_size,
      dtype=shape.dtype,
      max_query_length=longest,
      num_tokens=int(shape.query_lengths.sum()),
      window=shape.window,
      implementation=implementation,
      **dict.fromkeys(options, True),
    )
    if replan is not None:
      plan = replan(plan)

    @jax.jit  # traced and lowered once, whatever the number of layers
    def one(state, plan, query, layer):
      return api.paged_attention(
        query,
        state["k_pages"],
        state["v_pages"],
        state["page_table"],
        state["lengths"],
        query_starts=None if decode else state["query_starts"],
        max_query_length=longest,
        layer=layer,
        window=shape.window,
        soft_cap=shape.soft_cap,
        sinks=state["sinks"],
        plan=plan,
        implementation=implementation,
        interpret=interpret,
      )

    # A traced layer: one program serves all of them.
    return lambda query, layer: one(
      state, plan, query, jnp.asarray(layer, jnp.int32)
    )

  return prepare


def chain(
  prepare: Callable[[Any], Attend], *, layers: int, steps: int, rounds: int = 1
) -> Callable[..., tuple[Array, Array]]:
  """Returns the jitted (state, query, first=0) -> (first, last output).

  The query of a layer is the output of the one before: layers wait for each
  other, and nothing but attention runs.

  Args:
    prepare: state -> attend, as from `ours` or `peers`.
    layers: L; step i attends to layer (first + i) % L. Passing `first` traced
      lets a short program visit all layers, call by call.
    steps: attention layers of a round, at least 1.
    rounds: how often the program does all of it, plan included, as a loop on
      the device: what starting a program costs is shared by so many.
  """

  def one_round(state, query, first):
    attend = prepare(state)
    outputs = []
    for step in range(steps):
      query = attend(query, (first + step) % layers)
      outputs.append(query)
    return outputs[0], outputs[-1]

  def program(state, query, first=0):
    if rounds == 1:
      return one_round(state, query, first)

    def body(i, carry):
      # Tied to the query, or the plan would be taken out of the loop.
      held, query = lax.optimization_barrier((state, carry[1]))
      output, last = one_round(held, query, first)
      return jnp.where(i == 0, output, carry[0]), last

    return lax.fori_loop(0, rounds, body, (jnp.zeros_like(query), query))

  return jax.jit(program)


def pool_layers(shape: shapes.Shape, cold_bytes: int, most: int = 32) -> int:
  """L: so many that the K and V of all layers reach `cold_bytes`."""
  return max(1, min(most, -(-cold_bytes // max(shape.kv_bytes, 1))))
