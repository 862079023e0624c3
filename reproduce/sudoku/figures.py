"""Figures of the Sudoku experiment: Fig. 2 of the paper, and what belongs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reproduce.style import FAINT, INK, SERIES, SOFT, figure
from reproduce.sudoku import statistics as st

Array = npt.NDArray[Any]


def label(bounds: st.Bin) -> str:
    """``46–47 blanks``."""
    low, high = bounds
    return f"{low} blanks" if low == high else f"{low}–{high} blanks"


def _logarithmic(axis: Any) -> None:
    """Ticks at powers of ten, and where they are few at 2 and 5 times them, as plain numbers: the style draws no math
    text. To be called once everything is drawn."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=5 if high > 1e5 * low else 12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def accuracy_by_steps(
    budgets: Sequence[int], solved: Array, blanks: st.Counts, bins: Sequence[st.Bin], mean_steps: float
) -> Any:
    """Fig. 2A: share of boards solved against test-time loop steps, for each difficulty; bars are 95 % intervals.

    Args:
        budgets: numbers of loop steps.
        solved: bool ``(q, len(budgets))``.
        blanks: difficulty, ``(q,)``.
        bins: of difficulty.
        mean_steps: of the training.
    """
    made, axes = figure(1, 1, width=5.6, height=3.8)
    axes.axvline(mean_steps, color=SOFT, ls=":", lw=1.2)
    axes.text(mean_steps, 1.035, "training mean", color=SOFT, ha="center", fontsize=8)
    for bounds, colour in zip(bins, SERIES, strict=False):
        group = solved[st.in_bin(blanks, bounds)]
        share = group.mean(0)
        ends = np.array([st.wilson(int(n), len(group)) for n in group.sum(0)]).T
        bars = np.stack([share - ends[0], ends[1] - share]).clip(min=0)
        axes.errorbar(
            budgets, share, bars, color=colour, marker="o", ms=3.5, lw=1.4, elinewidth=0.8, capsize=2,
            label=f"{label(bounds)} (n = {len(group)})",
        )  # fmt: skip
    axes.set(xlabel="test-time loop steps", ylabel="share of boards solved", ylim=(-0.02, 1.02))
    axes.legend(loc="lower right" if solved.mean(0)[-1] > 0.5 else "upper left")
    return made


def energy_curves(energies: Array, blanks: st.Counts, bins: Sequence[st.Bin]) -> Any:
    """Fig. 2B: SDI energy of the test puzzles at each loop step, and the same as a share of each puzzle's total.

    Args:
        energies: ``(q, steps)``.
        blanks: difficulty, ``(q,)``.
        bins: of difficulty.
    """
    made, (left, right) = figure(1, 2, width=9.4, height=3.8)
    steps = np.arange(1, energies.shape[1] + 1)
    for axes, curves, title in (
        (left, energies, "SDI energy"),
        (right, energies / energies.sum(1, keepdims=True), "share of the puzzle's energy"),
    ):
        for bounds, colour in zip(bins, SERIES, strict=False):
            low, median, high = st.band(curves[st.in_bin(blanks, bounds)])
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, median, color=colour, marker="o", ms=3, lw=1.5, label=label(bounds))
        axes.set(xlabel="loop step", ylabel=title)
        _logarithmic(axes.yaxis)
        if len(steps) <= 16:
            axes.set_xticks(steps)
    right.legend()
    return made


def memorisation(self_influence: Array, mass: Array, blanks: st.Counts) -> Any:
    """Self-influence and cross-influence mass of the training puzzles against their difficulty and each other."""
    made, (first, second, third) = figure(1, 3, width=11.5, height=3.6)
    counts = np.unique(blanks)
    for axes, values, name in ((first, self_influence, "self-influence"), (second, mass, "cross-influence mass C")):
        groups = [values[blanks == count] for count in counts]
        axes.boxplot(
            groups, positions=counts, widths=0.6, showfliers=False, medianprops={"color": SERIES[1], "lw": 1.6},
            boxprops={"color": INK}, whiskerprops={"color": SOFT}, capprops={"color": SOFT}, manage_ticks=False,
        )  # fmt: skip
        axes.set(xlabel="blanks of the training puzzle", ylabel=name)
        axes.set_xticks(counts[::2])
        _logarithmic(axes.yaxis)
    third.axvline(float(np.quantile(self_influence, 0.25)), color=FAINT, lw=1)
    third.axhline(float(np.quantile(mass, 0.75)), color=FAINT, lw=1)
    points = third.scatter(self_influence, mass, c=blanks, cmap="cividis", s=9, lw=0)
    third.set(xlabel="self-influence", ylabel="cross-influence mass C")
    for axis in (third.xaxis, third.yaxis):
        _logarithmic(axis)
    made.colorbar(points, ax=third, label="blanks")
    return made


def by_training_group(sdi: Array, groups: Mapping[str, st.Mask], test_blanks: st.Counts, bins: Sequence[st.Bin]) -> Any:
    """Share of SDI energy at each step that easy and hard training puzzles place there, for the outer test bins."""
    made, panels = figure(1, 2, width=9.4, height=3.6, sharey=True)
    steps = np.arange(1, sdi.shape[2] + 1)
    for axes, bounds in zip(panels, (bins[0], bins[-1]), strict=True):
        chosen = st.in_bin(test_blanks, bounds)
        for (name, group), colour in zip(groups.items(), SERIES, strict=False):
            curves = st.energy(sdi[:, chosen], group)
            low, median, high = st.band(curves / curves.sum(1, keepdims=True))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, median, color=colour, marker="o", ms=3, lw=1.5, label=name)
        axes.axvline((sdi.shape[2] + 1) // 2 + 0.5, color=SOFT, ls=":", lw=1.2)
        axes.set(xlabel="loop step", title=f"test puzzles with {label(bounds)}")
        _logarithmic(axes.yaxis)
        if len(steps) <= 16:
            axes.set_xticks(steps)
    panels[0].set_ylabel("share of energy")
    panels[0].legend()
    return made


def training(losses: Array, loop_counts: Array) -> Any:
    """Loss of the training batches (running mean) and the loop steps that they ran."""
    made, (left, right) = figure(1, 2, width=9.4, height=3.2, width_ratios=(2, 1))
    window = max(1, len(losses) // 200)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    left.plot(np.arange(len(smooth)) + window, smooth, color=SERIES[0], lw=1.2)
    left.set(xlabel="update", ylabel=f"loss in nats, mean of {window}")
    _logarithmic(left.yaxis)
    right.hist(loop_counts, bins=np.arange(0.5, loop_counts.max() + 1), color=SERIES[0], rwidth=0.9)
    right.set(xlabel="loop steps", ylabel="batches")
    return made
