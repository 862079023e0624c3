"""Time and peak memory against batch size and loop steps, as lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stepinfluence.display.style import STYLE

from bench.per_example import models

COLOURS = ("#0072b2", "#56b4e9", "#c94f00", "#009e73", "#cc79a7", "#e69f00", "#7f5539", "#b8860b", "#5a6068", "#1c1e21")
MARKERS = "os^vDPX<>*"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of what ``result`` holds; the last point before memory ran out is crossed."""
    parts = [part for part in models.SIZES if result.get(part)]
    if not parts:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.2 * len(parts) + 1.4), layout="constrained")
        axes = figure.subplots(len(parts), 2, squeeze=False)
        for (left, right), part in zip(axes, parts, strict=True):
            _lines(left, result[part], part, "seconds", "seconds of one core")
            _lines(right, result[part], part, "peak_mib", "MiB added at the peak")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.savefig(path, dpi=110)


def _lines(axes: Axes, sizes: list[dict[str, Any]], part: str, value: str, label: str) -> None:
    names = list(dict.fromkeys(row["name"] for size in sizes for row in size["rows"]))
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        points, ended = [], False
        for size in sizes:
            row = next((r for r in size["rows"] if r["name"] == name), None)
            ended |= row is not None and row["out_of_memory"]
            if row is not None and row[value] is not None:
                points.append((size["size"][part], row[value]))
        if not points:
            continue
        wide = 2.4 if name.startswith("sdi-kernels") else 1.2
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=wide, label=name)
        if ended:
            axes.plot(*points[-1], marker="x", color=colour, markersize=13, markeredgewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([s["size"][part] for s in sizes], [str(s["size"][part]) for s in sizes])
    axes.set_xlabel({"batch": "examples in the batch", "steps": "loop steps"}[part])
    axes.set_ylabel(label)
