"""Figures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reproduce.planted.analyse import DETECTORS, REGIMES
from reproduce.planted.planting import KINDS
from reproduce.style import ACCENT, SERIES, SOFT, figure


def timing(numbers: Mapping[str, Any]) -> Any:
    """Energy and changes of the state by loop step, for every task and both ways of training."""
    made, axes = figure(2, len(numbers), width=2.6 * max(3, len(numbers)), height=5.4, squeeze=False, sharey=True)
    for row, (regime, meaning) in enumerate(REGIMES.items()):
        for axis, (task, found) in zip(axes[row], numbers.items(), strict=True):
            one = found["timing"][regime]
            steps = np.arange(1, len(one["energy_share"]) + 1)
            axis.bar(steps, _shares(one["decoded_mean"]), color="#d5dbe3", width=0.7, label="decoded changes")
            axis.plot(
                steps, _shares(one["known_mean"]), "s--", color=SOFT, ms=4, lw=1, label="changes by the algorithm"
            )
            axis.plot(steps, one["energy_share"], "o-", color=SERIES[0], ms=5, label="influence energy")
            axis.set_title(f"{task}: {meaning}" if len(numbers) < 3 else task, fontsize=10)
            axis.set_xticks(steps)
            if row:
                axis.set_xlabel("loop step")
        axes[row][0].set_ylabel(f"share\n({meaning})")
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return made


def critical(numbers: Mapping[str, Any]) -> Any:
    """Rank-biserial correlation with planted examples: one panel for each kind, a mark for each task."""
    names = list(next(iter(numbers.values()))["critical"])
    made, axes = figure(1, len(KINDS), width=10.5, height=0.9 + 0.36 * len(names), sharey=True)
    titles = {
        "duplicates": "copies of the query",
        "poisoned": "copies with a wrong answer",
        "rule": "examples of a rule",
    }
    places = np.arange(len(names))[::-1]
    for axis, kind in zip(axes, KINDS, strict=True):
        for index, (task, found) in enumerate(numbers.items()):
            values = [np.mean(found["critical"][name]["rank_biserial"][kind]) for name in names]
            offset = (index - (len(numbers) - 1) / 2) * 0.16
            axis.plot(values, places - offset, "osD^v"[index % 5], color=SERIES[index], ms=5, label=task)
        axis.axvline(0, color=SOFT, lw=0.8)
        axis.set_title(titles[kind], fontsize=10)
        axis.set_xlabel("rank-biserial correlation")
        axis.set_xlim(right=1.04)
        axis.grid(axis="y", color="#e3e1da", lw=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(places, names)
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(numbers))
    return made


def mislabelled(numbers: Mapping[str, Any]) -> Any:
    """AUC of each detector, and of self-influence by loop step."""
    made, (left, right) = figure(1, 2, width=10.5, height=3.6, width_ratios=(1.25, 1))
    names = list(DETECTORS)
    places = np.arange(len(names))[::-1]
    for index, (task, found) in enumerate(numbers.items()):
        rows = np.array([found["mislabelled"][name] for name in names])
        offset = (index - (len(numbers) - 1) / 2) * 0.18
        left.errorbar(
            rows[:, 0],
            places - offset,
            xerr=_around(rows),
            fmt="osD^v"[index % 5],
            color=SERIES[index],
            ms=4,
            lw=1,
            label=task,
        )
        by_step = np.array(found["mislabelled"]["by_step"])
        right.plot(np.arange(1, len(by_step) + 1), by_step[:, 0], "osD^v"[index % 5] + "-", color=SERIES[index], ms=4)
    right.xaxis.get_major_locator().set_params(integer=True)
    left.set_yticks(places, [DETECTORS[name] for name in names])
    left.set_xlabel("AUC (95 % interval)")
    right.set_xlabel("loop step")
    right.set_ylabel("AUC of self-influence at the step")
    for axis, line in ((left, left.axvline), (right, right.axhline)):
        line(0.5, color=SOFT, lw=0.8)
        axis.grid(color="#e3e1da", lw=0.6)
        axis.set_axisbelow(True)
    made.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(numbers))
    return made


def retraining(numbers: Mapping[str, Any]) -> Any:
    """Change of the queries' losses by removals, against random removals."""
    titles = {
        "rule": "most helpful removed:\nqueries of the rule",
        "poisoned": "most harmful removed:\npoisoned queries",
        "plain": "most helpful removed:\nplain queries",
    }
    made, axes = figure(1, 3, width=9.5, height=3.2)
    places = np.arange(len(numbers))[::-1]
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        rows = np.array([found["retraining"][kind] for found in numbers.values()])
        axis.errorbar(rows[:, 0], places, xerr=_around(rows), fmt="o", color=SERIES[0], ecolor=ACCENT, ms=5, capsize=3)
        axis.axvline(0, color=SOFT, lw=0.8)
        axis.set_yticks(places, list(numbers) if axis is axes[0] else [""] * len(numbers))
        axis.set_ylim(-0.6, len(numbers) - 0.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("change of loss (nats)")
    return made


def trajectories(numbers: Mapping[str, Any]) -> Any:
    """Mean SDI trajectory of planted and of other examples, as a share of the largest mean of the task."""
    made, axes = figure(1, len(numbers), width=2.6 * max(3, len(numbers)), height=3.1, squeeze=False, sharey=True)
    labels = {"duplicates": "copies", "poisoned": "copies, wrong answer", "rule": "rule", "others": "all others"}
    for axis, (task, found) in zip(axes[0], numbers.items(), strict=True):
        groups = found["trajectories"]
        largest = max(abs(v) for values in groups.values() for v in values)
        for index, (group, values) in enumerate(groups.items()):
            axis.plot(
                np.arange(1, len(values) + 1),
                np.asarray(values) / largest,
                "osD^v"[index] + "-",
                color=SOFT if group == "others" else SERIES[index],
                ms=4,
                label=labels[group],
            )
        axis.axhline(0, color=SOFT, lw=0.8)
        axis.set_yscale("symlog", linthresh=0.01)  # wrong answers weigh a hundred times what is already learnt does
        axis.set_yticks([-1, -0.1, -0.01, 0, 0.01, 0.1, 1], ["-1", "-0.1", "-0.01", "0", "0.01", "0.1", "1"])
        axis.minorticks_off()
        axis.set_xticks(range(1, len(values) + 1))
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("loop step of the query")
    axes[0][0].set_ylabel("mean SDI (largest = 1)")
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return made


def _shares(values: Sequence[float]) -> Any:
    array = np.asarray(values, dtype=float)
    return array / array.sum() if array.sum() else array


def _around(rows: Any) -> Any:
    """Distances of the interval's ends from the mean, as ``errorbar`` takes them."""
    return np.abs(np.stack([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]))
