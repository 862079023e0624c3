"""Draw the figures of docs/curvature.md and docs/curvature-evidence.md from the kept results.

python docs/_site/curvature_figures.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from kept import ROOT
from parts_curvature import COMPARED, differences
from parts_evaluation import kept

from bench.kronecker import __main__ as kron
from reproduce.style import FAINT, INK, SERIES, SOFT, figure, styled

IMAGES = ROOT / "docs" / "images"
GRID = tuple(range(-5, 1))
"""Exponents of the grid of dampings."""
RULES = {
    "fisher, auto": (SERIES[0], "--"),
    "fisher, training": (SERIES[0], "-"),
    "source of a run": (SERIES[2], "-"),
    "none": (SOFT, ":"),
}
"""What takes no damping of the grid, and how it is drawn."""


def factors() -> tuple[Any, dict[str, Any]]:
    """LDS of Kronecker factors less that of the sketched Fisher: the figure, and what it shows."""
    lds = {problem: result["lds"] for problem, result in kept("kronecker").items()}
    found = {
        title: {method: differences(lds, method, dampings) for method in kron.KRONECKER}
        for title, dampings in COMPARED.items()
    }
    made, axes = figure(1, len(lds), width=11.0, height=7.0, sharey=True)
    for problem, axis in zip(lds, axes, strict=True):
        axis.axvline(0, color=INK, linewidth=0.8)
        for row in range(0, len(kron.KRONECKER), 2):
            axis.axhspan(row - 0.5, row + 0.5, color=FAINT, alpha=0.35, linewidth=0)
        for number, (title, methods) in enumerate(found.items()):
            shown = [by_problem[problem] for by_problem in methods.values()]
            middle = np.array([one.value for one in shown])
            reach = [middle - [one.low for one in shown], [one.high for one in shown] - middle]
            places = np.arange(len(shown)) + 0.2 * (number - 1.5)
            style = {"color": SERIES[number], "fmt": "o", "markersize": 3.5, "linewidth": 1.2}
            axis.errorbar(middle, places, xerr=reach, label=title.replace("`", ""), **style)
        axis.set(title=problem, xlabel="LDS less that of the Fisher", ylim=(len(kron.KRONECKER) - 0.5, -0.5))
    axes[0].set_yticks(range(len(kron.KRONECKER)), kron.KRONECKER)
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return made, {title: _numbers(methods) for title, methods in found.items()}


def _numbers(methods: Any) -> dict[str, Any]:
    return {
        method: {problem: [round(x, 4) for x in (one.value, one.low, one.high)] for problem, one in found.items()}
        for method, found in methods.items()
    }


def dampings() -> tuple[Any, dict[str, Any]]:
    """LDS by damping: the figure, and what it shows."""
    lds = {
        problem: {name: round(float(np.mean(values)), 4) for name, values in result["lds"].items()}
        for problem, result in kept("dampings").items()
    }
    made, axes = figure(1, len(lds), width=11.0, height=3.4, sharey=True)
    for (problem, known), axis in zip(lds.items(), axes, strict=True):
        for matrix, color in (("fisher", SERIES[0]), ("block", SERIES[1])):
            values = [known[f"{matrix}, 1e{exponent:+03d}"] for exponent in GRID]
            axis.plot(GRID, values, marker="o", markersize=3.5, color=color, label=f"{matrix}, damping of the axis")
        for name, (color, dashes) in RULES.items():
            axis.axhline(known[name], color=color, linestyle=dashes, linewidth=1.2, label=name)
        axis.set(title=problem, xticks=GRID[::2], xticklabels=[f"1e{k}" for k in GRID[::2]])
    axes[0].set(ylabel="LDS, mean over five seeds", ylim=(0, None))  # one scale for all: set when all are drawn
    axes[len(lds) // 2].set_xlabel("damping, relative to the largest eigenvalue")
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return made, lds


FIGURES = {"curvature-dampings": dampings, "curvature-kronecker": factors}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        with styled():
            made, numbers = draw()
            # What is drawn stands in the file, so that a test sees where a result has changed and its figure has not.
            about = {"Description": json.dumps(numbers), "Software": None}
            made.savefig(IMAGES / f"{name}.png", dpi=110, metadata=about)
