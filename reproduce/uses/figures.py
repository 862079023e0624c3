"""Figures of the experiment ``uses``: one for each part, named as the part is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from stepinfluence.evaluation import over_seeds

from reproduce.base import Result
from reproduce.style import INK, SERIES, SOFT, figure
from reproduce.uses.curriculum import ORDERS
from reproduce.uses.late import EARLY, LATE
from reproduce.uses.probes import REGIMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT = {"self": "self-influence", "queries": "harm to held-out queries"}


def late(stages: Sequence[Result]) -> Figure:
    """AUC of wrong examples by the loop step of the score, with all steps and the loss as lines."""
    made: Figure
    made, axes = figure(1, 2, width=10.0, height=3.8, sharey=True)
    for axis, (of, title) in zip(axes, WHAT.items(), strict=True):
        for colour, what in zip(SERIES, (LATE, EARLY, f"{LATE} against {EARLY}"), strict=False):
            names = [name for name in stages[0]["auc"][what][of] if name.startswith("step ")]
            steps = range(1, len(names) + 1)
            _band(axis, steps, [[s["auc"][what][of][name] for s in stages] for name in names], colour, f"wrong {what}")
            for name, kind, line in (("all steps", of, "--"), ("loss", "loss", ":")):
                value = float(np.mean([s["auc"][what][kind][name] for s in stages]))
                axis.axhline(value, color=colour, linestyle=line, linewidth=0.9)
        axis.axvline(stages[0]["middle"] + 0.5, color=SOFT, linewidth=0.8)
        axis.set(xlabel="loop step", title=title, ylim=(0, 1.03))
    axes[0].set_ylabel("AUC (dashed: all steps, dotted: loss)")
    axes[0].legend(fontsize=8)
    return made


def probes(stages: Sequence[Result]) -> Figure:
    """Accuracy of probes, and share of influence energy, by loop step."""
    made: Figure
    made, axes = figure(1, 2, width=10.0, height=3.6, sharey=True)
    for axis, regime in zip(axes, REGIMES, strict=True):
        steps = range(1, len(stages[0][regime]["energy"]) + 1)
        for colour, name, label in (
            (SERIES[0], "answer", "probe for the answer"),
            (SERIES[1], "state", "probe for the state"),
            (INK, "energy", "share of SDI energy"),
        ):
            _band(axis, steps, [[s[regime][name][t - 1] for s in stages] for t in steps], colour, label)
        for peak in {s[regime]["peak"] for s in stages}:
            axis.axvline(peak, color=SOFT, linestyle=":", linewidth=1)
        axis.set(xlabel="loop step (dotted: peak of a seed)", title=regime, ylim=(0, 1.03))
    axes[0].legend(fontsize=8)
    return made


def curriculum(stages: Sequence[Result]) -> Figure:
    """Held-out loss in the course of training, and its difference from the random order's."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    made: Figure
    made, axes = figure(1, 2, width=10.0, height=3.8)
    looks = range(1, len(stages[0][ORDERS[0]]["losses"]) + 1)
    shares = [k / len(looks) for k in looks]
    for colour, order in zip(SERIES, ORDERS, strict=False):
        runs = np.array([s[order]["losses"] for s in stages])
        _band(axes[0], shares, runs.T.tolist(), colour, order)
        _band(axes[1], shares, (runs - np.array([s["random"]["losses"] for s in stages])).T.tolist(), colour, order)
    axes[0].set(xlabel="share of training", ylabel="held-out loss of the answer, nats", yscale="log")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # math text is off
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set(xlabel="share of training", ylabel="the same, less the random order's")
    axes[0].legend(fontsize=8)
    return made


def _band(axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, name: str) -> None:
    """Mean over seeds, and the range of the seeds."""
    found = [over_seeds(v) for v in values]
    axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, [v.value for v in found], color=colour, marker="o", markersize=3, label=name)
