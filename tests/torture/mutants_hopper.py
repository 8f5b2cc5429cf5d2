"""Mutants of the Hopper kernels: see test_mutants.py.

The tests that must fail are interpreted on a CPU, the quick ones of tests/ops
where one will do.
"""

_DECODE = "tests/ops/test_hopper.py::test_kernels[{}]"
_PLAN = "tests/ops/test_hopper_plan.py::test_shares_cover_every_page_once"
_PACE = "tests/ops/test_hopper_pace.py::test_{}"
_PARTS = "tests/ops/test_hopper.py::test_segments_of_many_parts[16-lengths0]"
_GROW = "tests/ops/test_hopper.py::test_logits_that_grow[1]"
_INVARIANT = "tests/ops/test_hopper.py::test_batch_invariance[None]"
_STATE = "tests/ops/test_hopper_state.py::{}"
_SUITE = "tests/conformance/test_hopper.py::{}"
_PREFILL = "tests/ops/test_hopper_prefill.py::{}"
_MIXED = _PREFILL.format("test_mixed_batch_with_unaligned_starts")
_UNITS = _PREFILL.format("test_units_are_what_rows_see")
_VARIANT = _PREFILL.format("test_mixed_batch_variants[more{}]")
_SHARED = "tests/ops/test_hopper_shared.py::{}"
_ORDER = (
  "tests/ops/test_hopper_order.py::"
  "test_pages_that_all_tokens_see_whole_are_sorted"
)

# (file, expression, replacement, a test that must fail)
MUTANTS = {
  # Decode: what is in flight.
  "tiles fill slots that are being read": (
    "hopper_pace.py",
    "tile + 1 - depth",
    "tile - depth",
    _PACE.format("one_speed_for_all_without_a_number"),
  ),
  "slots not waited for": (
    "hopper_fetch.py",
    "self._wait(side, state.free, paced.free)",
    "self._wait(side, paced.free, paced.free)",
    "tests/ops/test_hopper.py::test_slots_are_used_again[False]",
  ),
  "whole segments paced": (
    "hopper_tuning.py",
    "paced = config.cut != WHOLE ",
    "paced = config.cut != None ",
    _PACE.format("others_are_not[changes2-256-whole]"),
  ),
  "who is ahead has more in flight": (
    "hopper_pace.py",
    "own <= state.last",
    "own > state.last",
    _PACE.format("who_is_ahead_has_less_in_flight[0]"),
  ),
  # Decode: masks.
  "keys before the window seen": (
    "hopper_softmax.py",
    "seen = (at >= low) & (at < high)",
    "seen = at < high",
    _DECODE.format("window"),
  ),
  "keys past the length seen": (
    "hopper_softmax.py",
    "seen = (at >= low) & (at < high)",
    "seen = at >= low",
    _DECODE.format("bundles of tiny pages"),
  ),
  "keys of the bundle's other heads seen": (
    "hopper_softmax.py",
    "return theirs == backend.across(",
    "return theirs >= 0 * backend.across(",
    _DECODE.format("bundles of tiny pages"),
  ),
  "tokens see later ones": (
    "hopper_softmax.py",
    "seen = at < backend.across(jnp.minimum(own + 1, high), c.tile)",
    "seen = at < high",
    _DECODE.format("few tokens"),
  ),
  "tokens see the next CTA's keys": (
    "hopper_softmax.py",
    "seen = at < backend.across(jnp.minimum(own + 1, high), c.tile)",
    "seen = at < backend.across(own + 1, c.tile)",
    _DECODE.format("rows off groups of 8"),
  ),
  "no window among tokens": (
    "hopper_softmax.py",
    "seen &= at > backend.across(own - inputs.window, c.tile)",
    "seen &= at > -99999",
    _DECODE.format("few tokens"),
  ),
  "tokens before position 0 see keys": (
    "hopper_softmax.py",
    "end = jnp.where(own >= -position, c.tile, 0)",
    "end = jnp.where(own >= -99999, c.tile, 0)",
    _DECODE.format("more queries than keys"),
  ),
  "tiles that some token does not see all of": (
    "hopper_softmax.py",
    "some = position + c.tokens > first + 1",
    "some = position + c.tokens > first + 99999",
    "tests/ops/test_hopper.py::test_a_later_token_in_a_full_tile_is_not_seen",
  ),
  "tiles that some token's window does not hold all of": (
    "hopper_softmax.py",
    "some |= position + inputs.window < sequence[hopper_plan.HIGH]",
    "some |= position + inputs.window < -99999",
    _DECODE.format("a window from a tile's first position on"),
  ),
  "tiles where a row sees nothing": (
    "hopper_scores.py",
    "shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)",
    "shift = m_new",
    _DECODE.format("more queries than keys"),
  ),
  "earlier weights keep their scale": (
    "hopper_softmax.py",
    "l = l * backend.across(scores.alpha, hopper_scores.PARTS)",
    "l = l + 0",
    _GROW,
  ),
  "earlier results keep their scale": (
    "hopper_softmax.py",
    "acc = backend.rescale(acc, scores.alpha, self.interpret)",
    "acc = acc + 0",
    _GROW,
  ),
  # Decode: dead V, results.
  "dead V not zeroed": (
    "hopper_softmax.py",
    "dead = (position < low) | (position + c.tokens > high)",
    "dead = position < low",
    _DECODE.format("split segments"),
  ),
  "dead V before the window not zeroed": (
    "hopper_softmax.py",
    "dead = (position < low) | (position + c.tokens > high)",
    "dead = position + c.tokens > high",
    "tests/ops/test_hopper.py::test_slots_before_a_long_window_are_not_seen",
  ),
  "too little of V zeroed": (
    "backend/rows.py",
    "at = at // (heads * step) * step + at % step",
    "at = at // heads",
    _DECODE.format("rows off groups of 8"),
  ),
  "empty rows are not 0": (
    "hopper_state.py",
    "across(1.0 / jnp.where(l == 0.0, 1.0, l), acc)",
    "across(1.0 / l, acc)",
    _DECODE.format("whole segments, many rows"),
  ),
  "whole segments: another head's sink": (
    "hopper_softmax.py",
    "self.sinks[bundle * c.heads + h]",
    "self.sinks[h]",
    _DECODE.format("whole segments"),
  ),
  "no sinks": (
    "hopper_state.py",
    "l + jnp.exp2(sink - shift)",
    "l",
    _DECODE.format("whole segments"),
  ),
  "tokens that no row owns are not 0": (
    "hopper_softmax.py",
    "mine = inputs.num_tokens - used - helper",
    "mine = inputs.num_tokens - used - 1 - helper",
    _DECODE.format("few tokens"),
  ),
  # Decode: parts.
  "states: added at any maximum": (
    "hopper_state.py",
    "whole = lax.round(m, lax.RoundingMethod.TO_NEAREST_EVEN)",
    "whole = m",
    _STATE.format("test_a_sum_has_the_same_bits_however_it_is_made"),
  ),
  "states: all weigh the same": (
    "hopper_state.py",
    "_scale(state, jnp.exp2(state.m - shift), across)\n    acc, l",
    "state\n    acc, l",
    _STATE.format("test_a_sum_is_the_softmax_of_all_keys"),
  ),
  "states: what was added keeps its scale": (
    "hopper_state.py",
    "acc, _, l = _scale(first, jnp.exp2(first.m - shift), across)",
    "acc, _, l = first",
    _STATE.format("test_a_sum_is_the_softmax_of_all_keys"),
  ),
  "pieces of the segment before are taken along": (
    "hopper_softmax.py",
    "later = at.head & (at.item > 0)",
    "later = at.item >= 0",
    _INVARIANT,
  ),
  "parts: their numbers are those of others": (
    "hopper_decode.py",
    "part = share + b * c.segments + segment",
    "part = share + b * 0",
    _DECODE.format("split segments"),
  ),
  "parts: not waited for": (
    "hopper_decode.py",
    "rest = lax.div(rest + (size - 1), size)",
    "rest = lax.div(rest, size)",
    _DECODE.format("split segments"),
  ),
  "parts: waited for by those who have them": (
    "hopper_decode.py",
    "others=jnp.where(head, rest, 0)",
    "others=rest",
    _PARTS,
  ),
  "parts: not handed over": (
    "hopper_softmax.py",
    "@pl.when(jnp.logical_not(at.head))",
    "@pl.when(at.head)",
    _DECODE.format("split segments"),
  ),
  "parts: those who wait come first": (
    "hopper_decode.py",
    "lambda i, _: share(shares - 1 - i)",
    "lambda i, _: share(i)",
    _DECODE.format("split segments"),
  ),
  "parts: one flag for two warpgroups": (
    "hopper_merge.py",
    "return wg * (flags.shape[0] // self.config.consumers) + part",
    "return part + 0 * wg",
    _DECODE.format("many rows"),
  ),
  "parts: there are more than there are": (
    "hopper_merge.py",
    "m = jnp.where(at < count, m, -jnp.inf)",
    "m = m + 0",
    _DECODE.format("split segments"),
  ),
  "parts: another head's sink": (
    "hopper_merge.py",
    "self._numbers(self.sinks, (), number, rows)",
    "self._numbers(self.sinks, (), head, rows)",
    _DECODE.format("split segments"),
  ),
  "parts: query rows not where they were copied to": (
    "hopper_merge.py",
    "j * c.token_rows + hopper_fetch.row_shift(c, query_row)",
    "j * c.token_rows",
    _DECODE.format("rows off groups of 8"),
  ),
  "parts: heads of the next bundle": (
    "hopper_merge.py",
    "span = lead - head, c.heads - head",
    "span = lead - head, rows",
    _DECODE.format("rows off groups of 8"),
  ),
  "parts: row blocks as the first one": (
    "hopper_merge.py",
    "token = split.query_start + block",
    "token = split.query_start",
    _PARTS,
  ),
  # Decode: plan.
  "plan: shares too small": (
    "hopper_plan.py",
    "each = jnp.maximum(-(-total // num_ctas), 1)",
    "each = jnp.maximum(total // num_ctas, 1)",
    _PLAN,
  ),
  "plan: window a token short": (
    "hopper_plan.py",
    "lengths - query_length - geometry.window + 1",
    "lengths - query_length - geometry.window + 2",
    _DECODE.format("window"),
  ),
  "plan: work for rows without queries": (
    "hopper_plan.py",
    "units = jnp.where(query_length > 0, units, 0)",
    "units = jnp.where(query_length >= 0, units, 0)",
    _PLAN,
  ),
  "plan: rows without keys are not written": (
    "hopper_plan.py",
    "jnp.maximum(-(-lengths // step) - first, 1)",
    "jnp.maximum(-(-lengths // step) - first, 0)",
    _DECODE.format("split segments"),
  ),
  "plan: empty rows own work": (
    "hopper_plan.py",
    "ends[None, :] <= at[:, None]",
    "ends[None, :] < at[:, None]",
    _PLAN,
  ),
  # Prefill: masks.
  "prefill: not causal": (
    "hopper_prefill_compute.py",
    "last = jnp.minimum(own - position + 1, high)",
    "last = own * 0 + high",
    _MIXED,
  ),
  "prefill: tiles of later keys count as whole": (
    "hopper_prefill_units.py",
    "seen = jnp.minimum(seen, at + 1)",
    "seen = seen + 0",
    _UNITS,
  ),
  "prefill: no window": (
    "hopper_prefill_compute.py",
    "return own - position - (self.inputs.window - 1), last",
    "return own * 0 - 99999, last",
    _VARIANT.format(1),
  ),
  "prefill: tiles before a row's window count as whole": (
    "hopper_prefill_units.py",
    "low = jnp.maximum(at + own - self.inputs.window, 0)",
    "low = jnp.maximum(at + 1 - self.inputs.window, 0)",
    _UNITS,
  ),
  "prefill: a part before a row's window left out": (
    "hopper_prefill_units.py",
    "low = lax.div(jnp.maximum(low, 0), jnp.int32(width)) * width",
    "low = lax.div(jnp.maximum(low, 0) + 40, jnp.int32(width)) * width",
    _UNITS,
  ),
  "prefill: the last part left out": (
    "hopper_prefill_units.py",
    "end = lax.div(seen + (width - 1), jnp.int32(width)) * width",
    "end = lax.div(seen, jnp.int32(width)) * width",
    _UNITS,
  ),
  "prefill: parts that no row sees": (
    "hopper_prefill_units.py",
    "seen = jnp.minimum(seen, self.tile[plan.AT] + own)",
    "seen = seen + 0",
    _UNITS,
  ),
  "prefill: a tile's second part opens it again": (
    "hopper_prefill_units.py",
    "opens = part == 0",
    "opens = part >= 0",
    _UNITS,
  ),
  "prefill: pages of the next item not its own": (
    "hopper_prefill_fetch.py",
    "jnp.where(last, following_b, b),",
    "b + 0,",
    _PREFILL.format("test_page_ids_of_the_next_item_are_its_own"),
  ),
  "prefill: the list ends before tokens without a sequence": (
    "hopper_prefill_items.py",
    "listed - number - 2",
    "listed - number - 1",
    _MIXED,
  ),
  "prefill: tokens without a sequence all at the first of them": (
    "hopper_prefill_items.py",
    "first = tile[plan.TOKEN] + block * tokens",
    "first = tile[plan.TOKEN] + block * 0",
    _PREFILL.format("test_tokens_without_a_sequence_fill_many_tiles"),
  ),
  "prefill: an item's row overwritten while it is read": (
    "hopper_prefill_items.py",
    "backend.wait_if(r >= AHEAD, free.at[slot])",
    "backend.wait_if(r < 0, free.at[slot])",
    _MIXED,
  ),
  "memory order: pages that hold queries move": (
    "hopper_order.py",
    "stop = lengths - queries + 1",
    "stop = lengths",
    _ORDER,
  ),
  "memory order: the window's edge moves": (
    "hopper_order.py",
    "first = jnp.maximum(lengths - geometry.window, 0)",
    "first = first",
    _ORDER,
  ),
  "memory order: V stays where it was": (
    "hopper_order.py",
    "zip(found, tables, strict=True)",
    "zip((found[0], *tables[1:]), tables, strict=True)",
    "tests/ops/test_hopper_order.py::test_v_follows_k",
  ),
  "prefill plan: tiles without keys amid others": (
    "hopper_prefill_plan.py",
    "lax.clz(jnp.maximum(steps, 0))",
    "lax.clz(jnp.maximum(steps, 1))",
    _PREFILL.format("test_tiles_without_keys_come_last"),
  ),
  "shared: empty parts amid others": (
    "hopper_shared.py",
    "jnp.argsort(empty + 2 * unused)",
    "jnp.argsort(0 * empty + 2 * unused)",
    _SHARED.format("test_parts_of_the_prefix_cover_it_once"),
  ),
  "prefill: one warpgroup's rows left out": (
    "hopper_prefill_compute.py",
    "has_rows = self.wg * 64 < c.tokens_of(kind) * c.heads_of(kind)",
    "has_rows = self.wg <= 0",
    _MIXED,
  ),
  "prefill: tokens before position 0 see keys": (
    "hopper_prefill_compute.py",
    "last = jnp.where(own >= 0, high, 0)",
    "last = jnp.where(own >= -99, high, 0)",
    _SUITE.format(
      "TestHopperPrefill::test_more_queries_than_keys_without_causal"
    ),
  ),
  # Prefill: dead V, results.
  "prefill: dead V not zeroed": (
    "hopper_prefill_compute.py",
    "dead = length - position < size",
    "dead = length - position < -size",
    _MIXED,
  ),
  "prefill: dead V before the window not zeroed": (
    "hopper_prefill_compute.py",
    "dead |= low - position > 0",
    "dead |= low - position > 99999",
    _VARIANT.format(1),
  ),
  "prefill: earlier weights keep their scale": (
    "hopper_prefill_compute.py",
    "l = l * backend.across(scores.alpha, hopper_scores.PARTS)",
    "l = l + 0",
    _PREFILL.format("test_logits_that_grow"),
  ),
  "prefill: earlier values keep their scale": (
    "hopper_prefill_compute.py",
    "acc = backend.rescale(acc, scores.alpha, interpret)",
    "acc = acc + 0.0",
    _PREFILL.format("test_logits_that_grow"),
  ),
  "prefill: weights of late columns not summed": (
    "hopper_prefill_compute.py",
    "(early, width)\n      l += hopper_scores.sums(p)",
    "(early, width)\n      l += 0 * hopper_scores.sums(p)",
    _PREFILL.format("test_logits_that_grow"),
  ),
  "prefill: late columns weighted as the first ones": (
    "hopper_prefill_compute.py",
    "p = scores.weights(early, width)",
    "p = scores.weights(0, width - early)",
    _PREFILL.format("test_logits_that_grow"),
  ),
  "prefill: LSE in units of log2": (
    "hopper_prefill_softmax.py",
    "m * (1 / LOG2E) + jnp.log(l)",
    "m + jnp.log(l)",
    _MIXED,
  ),
  "prefill: no sinks": (
    "hopper_prefill_softmax.py",
    "l = l * alpha + jnp.exp2(sink - shift)",
    "l = l * alpha",
    _MIXED,
  ),
  "prefill: tokens that no row owns get sinks": (
    "hopper_prefill_softmax.py",
    "sink = jnp.where(tile[plan.LENGTH] < 0, -jnp.inf, sink)",
    "sink = sink + 0",
    _MIXED,
  ),
  "prefill: rows behind the tile's own stored": (
    "hopper_prefill_store.py",
    "own = (token < tokens_own) & (head < heads_left)",
    "own = (head < heads_left)",
    _MIXED,
  ),
  "prefill: another kv head's rows stored": (
    "hopper_prefill_store.py",
    "own = (token < tokens_own) & (head < heads_left)",
    "own = (token < tokens_own)",
    _VARIANT.format(0),
  ),
  "prefill: a block's tail stored by TMA": (
    "hopper_prefill_store.py",
    "whole &= tokens_own >= offset + min(tokens, 64)",
    "whole &= tokens_own >= offset",
    _MIXED,
  ),
  # Prefill: plan.
  "prefill plan: rows a position late": (
    "hopper_prefill_plan.py",
    "at = lengths[b] - stops[b] + first",
    "at = lengths[b] - stops[b] + first + 1",
    _PREFILL.format("test_tiles_hold_every_token_and_head_once"),
  ),
  "prefill plan: too few KV tiles": (
    "hopper_prefill_plan.py",
    "end = jnp.maximum(-(-high // tile), begin)",
    "end = jnp.maximum(high // tile, begin)",
    _PREFILL.format("test_tiles_walk_what_their_rows_see_longest_first"),
  ),
  "prefill plan: KV before the window walked": (
    "hopper_prefill_plan.py",
    "tile_low = jnp.maximum(at - geometry.window + 1, 0)",
    "tile_low = low + 0",
    _PREFILL.format("test_tiles_walk_what_their_rows_see_longest_first"),
  ),
  # Shared prefixes.
  "shared: a part of the prefix is left out": (
    "hopper_shared.py",
    "columns[lib.END] = steps * (part + 1) // config.splits",
    "columns[lib.END] = steps * part // config.splits + 1",
    _SHARED.format("test_parts_of_the_prefix_cover_it_once"),
  ),
  "shared: V pages may differ": (
    "hopper_shared.py",
    "for table in tables:\n    differs",
    "for table in tables[:1]:\n    differs",
    _SHARED.format("test_v_pages_must_be_equal_too"),
  ),
  "shared: up to the tokens of a query": (
    "hopper_shared.py",
    "_shared_pages(tables, lengths - queries, taking, first, p)",
    "_shared_pages(tables, lengths, taking, first, p)",
    _SHARED.format("test_rows_keep_their_queries_and_a_token"),
  ),
  "shared: rows that take no part merged": (
    "hopper_shared.py",
    "jnp.where(takes, lse, -jnp.inf) for lse in prefix_lse",
    "jnp.where(takes, lse, lse) for lse in prefix_lse",
    _SHARED.format("test_decode_rows_share_their_beginning"),
  ),
  "shared: partials weigh the same": (
    "hopper_shared.py",
    "weights = [jnp.exp(lse - most) for lse in lses]",
    "weights = [jnp.where(jnp.isneginf(x), 0.0, 1.0) for x in lses]",
    _SHARED.format("test_decode_rows_share_their_beginning"),
  ),
  "shared: what no tile wrote is added": (
    "hopper_shared.py",
    "partial = jnp.where(takes, partial, 0.0)",
    "partial = partial + 0.0",
    _SHARED.format("test_parts_that_no_tile_wrote_may_hold_anything"),
  ),
}
