"""One figure for each use: means over seeds, with 95 % intervals where there are bars or points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from stepinfluence.display.style import ACCENT, HARMFUL, HELPFUL, SOFT, STYLE
from stepinfluence.evaluation import over_seeds

Runs = Sequence[dict[str, Any]]


def draw(use: str, runs: Runs, path: Path) -> None:
    """Draw the figure of a use from the results of every seed."""
    with mpl.rc_context(STYLE):
        PICTURES[use](runs).savefig(path, dpi=150)


def mislabelled(runs: Runs) -> Figure:
    """Share of the wrong labels among as many first suspects, by score and problem."""
    problems = list(runs[0])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), sharex=True, sharey=True), problems, strict=True):
        names = list(runs[0][problem])
        _dots(axes, names, [[run[problem][name]["found"] for run in runs] for name in names])
        axes.axvline(1 / 16, color=SOFT, linestyle=":", linewidth=1)
        axes.set_title(problem, loc="left", fontsize=10)
        axes.set_xlabel("share of the wrong labels found")
        axes.set_xlim(0, 1)
    return figure


def curation(runs: Runs) -> Figure:
    """Accuracy on new targets after fine-tuning, by way of choosing."""
    names = list(runs[0])
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    _dots(axes, names, [[run[name]["accuracy"] for run in runs] for name in names])
    axes.axvline(np.mean([run["random"]["accuracy"] for run in runs]), color=SOFT, linestyle=":", linewidth=1)
    axes.set_xlabel("accuracy on new targets after fine-tuning (dotted: on a random choice)")
    return figure


def horizon(runs: Runs) -> Figure:
    """Share of the energy by distance from the read-out, and accuracy by loop count."""
    names = list(runs[0])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for k, (name, (top, bottom)) in enumerate(zip(names, figure.subplots(2, len(names), sharey="row").T, strict=True)):
        steps = np.arange(1, len(runs[0][name]["share"]) + 1)
        trained = int(name.rsplit(" ", 1)[1])
        share = np.array([run[name]["share"] for run in runs])
        accuracy = np.array([run[name]["accuracy"] for run in runs])
        top.bar(steps, share.mean(0), color=HELPFUL)
        for line in accuracy:
            bottom.plot(steps, line, color=SOFT, linewidth=0.6, alpha=0.6)
        bottom.plot(steps, accuracy.mean(0), color=ACCENT, marker="o", markersize=3)
        bottom.axvline(trained, color=HARMFUL, linestyle=":", linewidth=1.2)
        top.set_title(name, loc="left", fontsize=9)
        top.set_xlabel("loop step")
        bottom.set_xlabel("loops at test time")
        if k == 0:
            top.set_ylabel("share of energy")
            bottom.set_ylabel("accuracy")
    return figure


def cancellation(runs: Runs) -> Figure:
    """How much of their step terms loud pairs cancel."""
    problems = list(runs[0])
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), sharey=True), problems, strict=True):
        shares = np.array([run[problem]["histogram"] for run in runs])
        places = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
        axes.bar(places, shares.mean(0), width=0.9 / shares.shape[1], color=HELPFUL)
        for run in shares:
            axes.plot(places, run, ".", color=ACCENT, markersize=2)
        axes.set_title(problem, loc="left", fontsize=10)
        axes.set_xlabel("cancelled: 1 − |sum of steps| / sum of |steps|")
    figure.axes[0].set_ylabel("share of loud pairs")
    return figure


def _dots(axes: Any, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """A row for each name: every seed as a point, mean and interval on top."""
    for row, of_name in enumerate(values):
        found = over_seeds(of_name)
        axes.plot(of_name, [row] * len(of_name), ".", color=SOFT, alpha=0.5, markersize=4)
        axes.plot([found.low, found.high], [row, row], color=ACCENT, linewidth=2)
        axes.plot(found.value, row, "o", color=HELPFUL, markersize=6)
    axes.set_yticks(range(len(names)), names)
    if not axes.yaxis_inverted():  # axes may share it
        axes.invert_yaxis()


PICTURES: dict[str, Callable[[Runs], Figure]] = {
    "mislabelled": mislabelled,
    "curation": curation,
    "horizon": horizon,
    "cancellation": cancellation,
}
