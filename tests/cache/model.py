"""A page table in thirty lines of plain Python, to compare with."""


class ModelTable:
  """Rows are lists of (K page, V page) columns; the pool is a count a page."""

  def __init__(self, P, p, B, M, combined):
    self.P, self.p, self.M, self.combined = P, p, M, combined
    self.rows, self.lengths = [[] for _ in range(B)], [0] * B
    self.counts = [0] * P

  def reserve(self, num_tokens):
    free = [page for page in range(self.P) if not self.counts[page]]
    left, ok = len(free), []
    for b, n in enumerate(num_tokens):
      columns = -(-(self.lengths[b] + n) // self.p)
      new = max(columns - len(self.rows[b]), 0)
      need = new * (2 if self.combined else 1)
      fits = n >= 0 and columns <= self.M
      left -= need if fits else 0
      ok.append(fits and (need == 0 or left >= 0))
      for _ in range(new if ok[-1] else 0):
        k = free.pop(0)
        v = free.pop(0) if self.combined else k
        self.rows[b].append((k, v))
        for page in {k, v}:
          self.counts[page] += 1
    return ok

  def slots(self, num_tokens, total, kind):
    out = []
    for b, n in enumerate(num_tokens):
      held = self.lengths[b] + n <= len(self.rows[b]) * self.p
      for at in range(self.lengths[b], self.lengths[b] + n):
        page = self.rows[b][at // self.p][kind] if held else self.P
        out.append(page * self.p + at % self.p if held else self.P * self.p)
    return (out + [self.P * self.p] * total)[:total]

  def advance(self, num_tokens):
    for b, n in enumerate(num_tokens):
      if 0 <= n <= len(self.rows[b]) * self.p - self.lengths[b]:
        self.lengths[b] += n

  def release(self, rows):
    for b, chosen in enumerate(rows):
      for column in self.rows[b] if chosen else ():
        for page in set(column):
          self.counts[page] -= 1
      if chosen:
        self.rows[b], self.lengths[b] = [], 0

  def fork(self, parents):
    ok, before = [], [list(row) for row in self.rows]
    for b, parent in enumerate(parents):
      asked = parent != len(self.rows)
      good = 0 <= parent < len(self.rows) and parents[parent] == len(self.rows)
      good = good and not before[b] and not self.lengths[b]
      ok.append(not asked or good)
      if asked and good:
        self.rows[b] = before[parent][: -(-self.lengths[parent] // self.p)]
        self.lengths[b] = self.lengths[parent]
        for page in (x for column in self.rows[b] for x in set(column)):
          self.counts[page] += 1
    return ok

  def copy_on_write(self, num_tokens):
    free = [page for page in range(self.P) if not self.counts[page]]
    left, ok, copies = len(free), [], []
    counts = list(self.counts)  # all rows decide on the state before
    for b, n in enumerate(num_tokens):
      at = self.lengths[b] // self.p
      column = self.rows[b][at] if at < len(self.rows[b]) else ()
      shared = n > 0 and any(counts[page] > 1 for page in column)
      left -= len(set(column)) if shared else 0
      ok.append(not shared or left >= 0)
      if shared and ok[-1]:
        new = [free.pop(0) for _ in sorted(set(column))]
        copies.append((b, column, (new[0], new[-1])))
        self.rows[b][at] = (new[0], new[-1])
        for page in set(column):
          self.counts[page] -= 1
        for page in new:
          self.counts[page] += 1
    return ok, copies
