"""The loss against the step, on training and held-out text."""

import pathlib
from typing import Any

from matplotlib import figure
import numpy as np

_INK, _SOFT, _PALE = "#1b1f24", "#6a737d", "#c6dbef"
_TRAIN, _HELD_OUT = "#2171b5", "#d94801"
_SMOOTHED = 30  # points the smoothed curve of a whole run is made of


def losses(
  rows: list[dict[str, Any]], path: str | pathlib.Path, title: str
) -> None:
  """Draws the losses of a run.

  Args:
    rows: each with `step`, `loss` (training, nats a byte) and `held_out`
      (nats a byte, or None where it was not measured), in order of step.
    path: of the PNG.
    title: above the plot.
  """
  step = np.array([row["step"] for row in rows])
  loss = np.array([row["loss"] for row in rows])
  held_out = [
    (row["step"], row["held_out"])
    for row in rows
    if row["held_out"] is not None
  ]
  # A Figure of its own: no global state, no display needed.
  fig = figure.Figure(figsize=(6.4, 3.8), layout="constrained")
  ax = fig.subplots()
  ax.plot(step, loss, color=_PALE, linewidth=0.8)
  # Means of neighbours; every batch has its own difficulty.
  width = max(1, len(step) // _SMOOTHED)
  mean = lambda x: np.convolve(x, np.full(width, 1 / width), mode="valid")
  ax.plot(mean(step), mean(loss), color=_TRAIN, label="training (mean)")
  if held_out:
    ax.plot(
      *zip(*held_out), "o-", color=_HELD_OUT, markersize=3.5, label="held out"
    )
    last = held_out[-1]
    ax.annotate(
      f"{last[1]:.3f}", last, xytext=(4, 4), textcoords="offset points",
      fontsize=8, color=_HELD_OUT,
    )
  ax.set_title(title, fontsize=9.5, color=_INK, loc="left")
  ax.set_xlabel("step", fontsize=8, color=_SOFT)
  ax.set_ylabel("cross-entropy (nats a byte)", fontsize=8, color=_SOFT)
  ax.tick_params(labelsize=8, labelcolor=_SOFT, color=_SOFT)
  ax.grid(color="#e5e7eb", linewidth=0.6)
  ax.legend(fontsize=8, frameon=False, labelcolor=_INK)
  for side in ("top", "right"):
    ax.spines[side].set_visible(False)
  fig.savefig(path, dpi=140)
