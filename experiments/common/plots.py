"""Heat maps: page size across, head geometry down."""

import io
from typing import Any

from matplotlib import figure
import numpy as np

Row = dict[str, Any]
_INK, _SOFT, _BAD, _EMPTY = "#1b1f24", "#6a737d", "#b42318", "#f3f4f6"
_DPI = 110
_FAILED = ("wrong", "failed")


def heat_maps(rows: list[Row]) -> dict[str, bytes]:
  """Draws all heat maps the rows have data for.

  Args:
    rows: of a sweep.

  Returns:
    PNG bytes by name: `speed_<phase>` where something was timed, and
    `errors`, every verified cell's error as a part of its bound.
  """
  images = {}
  for phase in ("decode", "prefill"):
    mine = [row for row in rows if row["phase"] == phase]
    timed = [row for row in mine if row.get("median_us")]
    if timed:
      names = _unique(row["implementation"] for row in timed)
      shown = timed + [row for row in mine if row["status"] in _FAILED]
      panels = [
        (f"{name}, {phase}",
         [row for row in shown if row["implementation"] == name])
        for name in names
      ]
      images[f"speed_{phase}"] = _draw(
        panels, mine, _fraction, _speed, True, "fraction of the ceiling",
        "Blues",
      )
  checked = [row for row in rows if row.get("of_bound") is not None]
  if checked:
    kinds = _unique(
      (row["implementation"], row["mode"], row["phase"]) for row in checked
    )
    panels = [
      (f"{name}, {phase}" + (", interpreted" * (mode == "interpret")),
       [row for row in checked
        if (row["implementation"], row["mode"], row["phase"]) ==
        (name, mode, phase)])
      for name, mode, phase in kinds
    ]
    images["errors"] = _draw(
      panels, rows, _error, _percent, False, "error / bound", "Oranges"
    )
  return images


def label(row: Row) -> str:
  """Names a row's head geometry: "G = 4" or the model's name."""
  if row["group"] == "ratio axis":
    return f"G = {row['ratio']}"
  heads = f"{row['num_heads']}/{row['num_kv_heads']} H {row['head_dim']}"
  return f"{row['group']}  {heads}"


def _draw(panels, rows, value, text, best, title, colours):
  sizes = sorted({row["page_size"] for row in rows})
  labels = _unique(label(row) for row in rows)
  across = min(len(panels), 2)
  down = -(-len(panels) // across)
  width = 2.3 + across * (0.74 * len(sizes) + 0.2)
  height = down * (0.75 + 0.42 * len(labels))
  # A Figure of its own: no global state, no display needed.
  fig = figure.Figure(figsize=(max(width, 5.2), height), layout="constrained")
  axes = fig.subplots(down, across, sharey=True, squeeze=False).ravel()
  for ax in axes[len(panels):]:
    ax.remove()
  axes = axes[: len(panels)]
  image = None
  for ax, (name, cells) in zip(axes, panels):
    grid = np.full((len(labels), len(sizes)), np.nan)
    place = lambda row: (
      labels.index(label(row)), sizes.index(row["page_size"])
    )
    for row in cells:
      if value(row) is not None:
        grid[place(row)] = value(row)
    for row in cells:
      y, x = place(row)
      failed = value(row) is None
      peers = np.delete(grid[y], x)
      peers = peers[~np.isnan(peers)]
      bold = failed or (best and peers.size and peers.max() < grid[y, x])
      colour = "white" if grid[y, x] > 0.55 else _INK
      ax.text(x, y, "failed" if failed else text(row), ha="center",
              va="center", fontsize=7, linespacing=1.15,
              color=_BAD if failed else colour,
              weight="bold" if bold else "normal")
    ax.set_facecolor(_EMPTY)
    image = ax.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    ax.set_title(name, fontsize=9.5, color=_INK, loc="left")
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xticks(np.arange(len(sizes) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.6)
    ax.tick_params(which="both", length=0, labelsize=8, labelcolor=_SOFT)
    for side in ax.spines.values():
      side.set_visible(False)
    ax.set_xlabel("page size (tokens)", fontsize=8, color=_SOFT)
  bar = fig.colorbar(image, ax=list(axes), fraction=0.03, pad=0.015, aspect=30)
  bar.set_label(title, fontsize=8, color=_SOFT)
  bar.ax.tick_params(labelsize=7, length=0, labelcolor=_SOFT)
  bar.outline.set_visible(False)
  out = io.BytesIO()
  fig.savefig(out, dpi=_DPI, format="png", pil_kwargs=dict(optimize=True))
  return out.getvalue()


def _fraction(row):
  if not row.get("median_us"):
    return None
  return min(row["ceiling_fraction"], 1.0)


def _speed(row):
  if row["phase"] == "decode":
    value, unit = row["gbps"] * 1e9, "B/s"
  else:
    value, unit = row["tflops"] * 1e12, "F/s"
  power = 4 if value >= 1e12 else 3
  value /= 1e3**power
  digits = 0 if value >= 100 else 1 if value >= 10 else 2
  rate = f"{value:.{digits}f} {' kMGT'[power]}{unit}"
  return f"{rate}\n{100 * row['ceiling_fraction']:.0f} %"


def _error(row):
  return row["of_bound"]


def _percent(row):
  return f"{100 * _error(row):.0f} %"


def _unique(values):
  return list(dict.fromkeys(values))
