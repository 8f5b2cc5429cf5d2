"""Paged attention in NumPy float64, written for obviousness alone.

Independent of the library: it shares no code with it, so the library's own
reference is tested against it too.
"""

import numpy as np


def attend(
  query,
  k_pages,
  v_pages,
  page_table,
  lengths,
  *,
  query_starts=None,
  layer=None,
  scale=None,
  causal=True,
  window=None,
  soft_cap=None,
  sinks=None,
  round_to=None,
):
  """Returns (out [T, N, H], lse [T, N]) in float64, one query row at a time.

  With `round_to`, a dtype: the naive attention of that dtype, whose logits,
  probabilities and output are rounded to it while the softmax is float32. It
  sets the error that a half-precision implementation is allowed.
  """
  wide = np.float64 if round_to is None else np.float32
  rounded = (lambda x: x) if round_to is None else (
    lambda x: x.astype(round_to).astype(wide)
  )
  query = np.asarray(query).astype(wide)
  T, N, H = query.shape
  k_pages = np.asarray(k_pages)
  v_pages = k_pages if v_pages is None else np.asarray(v_pages)
  if layer is not None:
    k_pages, v_pages = k_pages[int(layer)], v_pages[int(layer)]
  K, p = k_pages.shape[1:3]
  tables = np.asarray(page_table)
  tables = tables if tables.ndim == 3 else np.stack([tables, tables], axis=1)
  B = tables.shape[0]
  if query_starts is None:
    query_starts = np.arange(B + 1)
  starts = np.asarray(query_starts)
  scale = H**-0.5 if scale is None else scale
  out, lse = np.zeros((T, N, H), wide), np.full((T, N), -np.inf, wide)
  for b in range(B):
    length, count = int(lengths[b]), int(starts[b + 1] - starts[b])
    k, v = (
      pool[tables[b, kind, : -(-length // p)]]  # [pages, K, p, H]
      .astype(wide)
      .transpose(0, 2, 1, 3)
      .reshape(-1, K, H)[:length]
      for kind, pool in enumerate((k_pages, v_pages))
    )
    for j in range(count):
      at, t = length - count + j, int(starts[b]) + j
      first = 0 if window is None else max(at - window + 1, 0)
      last = at if causal else length - 1
      if at < 0:
        first, last = 0, -1
      for n in range(N):
        head = n // (N // K)
        logits = rounded(scale * (k[first : last + 1, head] @ query[t, n]))
        if soft_cap is not None:
          logits = rounded(soft_cap * np.tanh(logits / soft_cap))
        sink = -np.inf if sinks is None else wide(np.asarray(sinks)[n])
        m = max(logits.max(initial=-np.inf), sink)
        if np.isneginf(m):
          continue
        weights = np.exp(logits - m)
        total = weights.sum() + np.exp(sink - m)
        share = rounded((weights / total).astype(wide))
        out[t, n] = rounded(share @ v[first : last + 1, head])
        lse[t, n] = m + np.log(total)
  return out, lse
