"""Plots of a bench: how near decode is to the ceiling, how fast prefill."""

from collections.abc import Sequence
import pathlib
from typing import Any

from matplotlib import figure

Row = dict[str, Any]
_PEER = dict(color="0.35", marker="_", ls="", ms=11, label="best stored peer")


def plot(rows: Sequence[Row], workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws what the rows have data for; returns the files."""
  timed = [row for row in rows if row.get("median_us")]
  paths = []
  for phases, draw, name in (
    (("decode", "shared"), _decode, "bench_decode.png"),
    (("prefill", "mixed"), _prefill, "bench_prefill.png"),
  ):
    mine = [row for row in timed if row["phase"] in phases]
    if len({row["name"] for row in mine}) > 1:
      fig = draw(mine)
      workdir.mkdir(parents=True, exist_ok=True)
      paths.append(workdir / name)
      fig.savefig(paths[-1], dpi=140)
  return paths


def _decode(rows):
  """Fraction of the ceiling against batch x context."""
  fig = figure.Figure(figsize=(6.4, 4.0), layout="constrained")
  ax = fig.subplots()
  for name in dict.fromkeys(row["implementation"] for row in rows):
    points = [
      (row["num_kv_tokens"], row["ceiling_fraction"])
      for row in rows
      if row["implementation"] == name
    ]
    ax.plot(*zip(*points), "o", ms=5, alpha=0.8, label=name)
  peers = {
    row["name"]: (row["num_kv_tokens"], row["limit_us"] / row["best_peer_us"])
    for row in rows
    if row.get("best_peer_us")
  }
  if peers:
    ax.plot(*zip(*peers.values()), **_PEER)
  ax.axhline(1, color="0.6", lw=0.8)
  ax.set(
    xscale="log",
    ylim=(0, 1.1),
    xlabel="tokens in the cache (batch x context)",
    ylabel="fraction of the ceiling",
    title=f"decode, {rows[0]['device']}",
  )
  _finish(ax)
  return fig


def _prefill(rows):
  """TFLOP/s, a group of bars a shape."""
  names = list(dict.fromkeys(row["name"] for row in rows))
  kinds = list(dict.fromkeys(row["implementation"] for row in rows))
  fig = figure.Figure(
    figsize=(8.4, 1.2 + 0.2 * len(names) * (len(kinds) + 1)),
    layout="constrained",
  )
  ax = fig.subplots()
  height = 0.8 / len(kinds)
  for i, kind in enumerate(kinds):
    mine = [row for row in rows if row["implementation"] == kind]
    at = [names.index(row["name"]) + i * height for row in mine]
    ax.barh(at, [row["tflops"] for row in mine], height, label=kind)
  middle = (len(kinds) - 1) * height / 2
  peers = {
    row["name"]: row["flops"] / row["best_peer_us"] / 1e6
    for row in rows
    if row.get("best_peer_us")
  }
  if peers:
    at = [names.index(name) + middle for name in peers]
    ax.plot(list(peers.values()), at, **_PEER | dict(marker="|", ms=18))
  ax.axvline(rows[0]["matmul_tflops"], color="0.6", lw=0.8)
  ax.set_yticks([i + middle for i in range(len(names))], names, fontsize=7)
  ax.invert_yaxis()
  ax.set(
    xlabel="TFLOP/s, causal work counted once; line: matmul ceiling",
    title=f"prefill, {rows[0]['device']}",
  )
  _finish(ax)
  return fig


def _finish(ax):
  ax.grid(alpha=0.25)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False, fontsize=8)
