"""What a person reads after a sweep: CSV, heat maps, one HTML file.

Everything is drawn from the rows of rows.jsonl alone, so a report can be made
again, elsewhere and later.
"""

import base64
import collections
import csv
import pathlib
from typing import Any

import jinja2

from experiments.common import plots

Row = dict[str, Any]
_NOT_IN_CSV = ("key", "name", "kernels", "recipe")


def write(
  rows: list[Row],
  workdir: pathlib.Path,
  *,
  title: str,
  needs_gpu: list[Row],
) -> dict[str, pathlib.Path]:
  """Writes report.csv, the PNG heat maps and report.html.

  Args:
    rows: of a sweep, as `cells.run` yields them.
    workdir: where to; made if missing.
    title: of the sweep.
    needs_gpu: cells that could not run here.

  Returns:
    Paths by kind: "csv", "html" and the name of every heat map.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  paths = {"csv": workdir / "report.csv", "html": workdir / "report.html"}
  _write_csv(rows, paths["csv"])
  images = plots.heat_maps(rows)
  for name, image in images.items():
    paths[name] = workdir / f"{name}.png"
    paths[name].write_bytes(image)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("experiments.common", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters.update(us=_us, sig=_sig, percent=_percent)
  html = environment.get_template("report.html").render(
    title=title,
    rows=rows,
    head=rows[-1] if rows else None,
    counts=_counts(rows),
    timed=[row for row in rows if row.get("median_us")],
    failed=[row for row in rows if row["status"] in ("wrong", "failed")],
    unsupported=[row for row in rows if row["status"] == "unsupported"],
    winners=winners(rows),
    waste=_waste(rows),
    images={
      name: base64.b64encode(image).decode() for name, image in images.items()
    },
    needs_gpu=needs_gpu,
    label=plots.label,
  )
  paths["html"].write_text(html, encoding="utf-8")
  return paths


def winners(rows: list[Row]) -> list[dict[str, Any]]:
  """Returns the fastest cell of every (phase, head geometry).

  Each with `spread`: the slowest page size's time over the fastest one's,
  same implementation.
  """
  groups = collections.defaultdict(list)
  for row in rows:
    if row.get("median_us"):
      groups[row["phase"], plots.label(row)].append(row)
  result = []
  for (phase, name), members in groups.items():
    best = min(members, key=lambda row: row["median_us"])
    same = [
      row["median_us"] for row in members
      if row["implementation"] == best["implementation"]
    ]
    result.append(dict(
      phase=phase,
      label=name,
      best=best,
      spread=max(same) / min(same),
      sizes=len(same),
    ))
  return result


def summary(rows: list[Row]) -> str:
  """Returns the winners as lines of text for the console."""
  lines = [
    f"  {w['phase']:8}{w['label']:28}{w['best']['implementation']:8}"
    f"page {w['best']['page_size']:<5}{_us(w['best']['median_us']):>9} us  "
    f"{_rate(w['best']):>12}  {_percent(w['best']['ceiling_fraction']):>5} "
    f"of the ceiling"
    for w in winners(rows)
  ]
  return "\n".join(["fastest, by phase and heads:", *lines]) if lines else ""


def _counts(rows):
  count = collections.Counter(row["status"] for row in rows)
  verified = [row for row in rows if row["status"] == "ok"]
  return dict(
    cells=len(rows),
    verified=len(verified),
    interpreted=sum(row["mode"] == "interpret" for row in verified),
    failed=count["failed"] + count["wrong"],
    unsupported=count["unsupported"],
  )


def _waste(rows):
  """Returns [(phase, [(page size, fraction of unused slots)])]."""
  table = collections.defaultdict(dict)
  for row in rows:
    table[row["phase"]][row["page_size"]] = row["waste"]
  return [(phase, sorted(sizes.items())) for phase, sizes in table.items()]


def _write_csv(rows, path):
  names = dict.fromkeys(
    name for row in rows for name in row if name not in _NOT_IN_CSV
  )
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(names), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)


def _rate(row):
  if row["phase"] == "decode":
    return f"{_sig(row['gbps'])} GB/s"
  return f"{_sig(row['tflops'])} TFLOP/s"


def _us(value):
  return f"{value:,.1f}" if value < 1e3 else f"{value:,.0f}"


def _sig(value):
  return f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}"


def _percent(value):
  return f"{100 * value:.{0 if value >= 0.1 else 1}f} %"
