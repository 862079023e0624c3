"""Figures of the experiment ``error``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from stepinfluence.evaluation import Estimate, over_seeds

from reproduce.base import Result
from reproduce.error.config import FAMILIES, Config
from reproduce.error.readings import bin_errors, lemma_numbers, recall_table, series
from reproduce.style import SERIES, SOFT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip(FAMILIES, SERIES, strict=False))


def depth(stages: Mapping[str, Sequence[Result]], config: Config) -> Figure:
    """Error over score by kind of loop, error over norms by family, and bias, against the number of steps."""
    made: Figure
    made, axes = figure(1, 3, width=13.0, height=4.0)
    loops = config.depth.loops
    for colour, (name, one) in zip(SERIES, stages.items(), strict=False):
        _band(axes[0], loops, series(one, "balanced", "relative"), colour, name)
        limits = [e.value for e in series(one, "balanced", "bound_relative")]
        axes[0].plot(loops, limits, color=colour, linestyle=":", linewidth=0.9)
    start = series(stages[list(stages)[-1]], "balanced", "relative")[0].value
    axes[0].plot(loops, start * (np.asarray(loops) / loops[0]) ** 0.5, color=SOFT, linestyle="--", label="slope 1/2")
    _doubling(axes[0], loops, "loop steps τ", "error over score (balanced)\ndotted: bound")
    axes[0].set_yscale("log")
    deepest = list(stages)[-2]
    for hashing in FAMILIES:
        _band(axes[1], loops, series(stages[deepest], hashing, "normalised"), COLOURS[hashing], hashing)
        limits = [e.value for e in series(stages[deepest], hashing, "bound_normalised")]
        axes[1].plot(loops, limits, color=COLOURS[hashing], linestyle=":", linewidth=0.9)
    _doubling(axes[1], loops, "loop steps τ", f"error over |g| |p| ({deepest})\ndotted: bound")
    axes[1].set_ylim(bottom=0)
    for colour, (name, one) in zip(SERIES, stages.items(), strict=False):
        values = [np.mean([s["levels"][k]["families"]["balanced"]["bias"] for s in one], 0) for k in range(len(loops))]
        _band(axes[2], loops, [over_seeds(v) for v in values], colour, name)
    axes[2].axhline(0, color=SOFT, linewidth=0.8)
    _doubling(axes[2], loops, "loop steps τ", "bias, share of the score (balanced)")
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=7)
    _plain(axes[:1])
    return made


def sparsity(structures: Mapping[str, Sequence[Result]]) -> Figure:
    """Error over norms by family and by structure, and the tail of the errors, against the share of entries kept."""
    made: Figure
    made, axes = figure(1, 3, width=13.0, height=4.0)
    entries = structures[next(iter(structures))]
    kept = _kept(entries)
    for hashing in FAMILIES:
        _band(axes[0], kept, series(entries, hashing, "normalised"), COLOURS[hashing], hashing)
        limits = [e.value for e in series(entries, hashing, "bound_normalised")]
        axes[0].plot(kept, limits, color=COLOURS[hashing], linestyle=":", linewidth=0.9)
    axes[0].set(xscale="log", ylim=(0, None), xlabel="share of entries that are not zero",
                ylabel="error over |g| |p| (largest entries)\ndotted: bound")  # fmt: skip
    for colour, (name, stages) in zip(SERIES[3:], structures.items(), strict=False):
        for axis, number in ((axes[1], "normalised"), (axes[2], "kurtosis")):
            _band(axis, _kept(stages), series(stages, "iid", number), colour, name)
    axes[1].set(xscale="log", ylim=(0, None), xlabel="share of entries that are not zero",
                ylabel="error over |g| |p| (iid)")  # fmt: skip
    axes[2].axhline(3, color=SOFT, linewidth=0.8)
    axes[2].set(xscale="log", yscale="log", xlabel="share of entries that are not zero",
                ylabel="kurtosis of the errors (iid)\nline: normal distribution")  # fmt: skip
    for axis in axes[:2]:
        axis.legend(fontsize=7)
    _plain(axes)
    return made


def lemma(stages: Sequence[Result], config: Config) -> Figure:
    """Mean squared error beside eq. 12 for each pair and step, its share by K, and what sharing hashes costs."""
    made: Figure
    made, axes = figure(1, 3, width=13.0, height=4.0)
    counts, numbers = config.lemma.checkpoints, lemma_numbers(stages, config)
    last = len(counts) - 1
    right = np.concatenate([np.asarray(s["lemma"])[last] for s in stages])
    for hashing in FAMILIES:
        left = np.concatenate([np.asarray(s[f"mse_{hashing}"])[last] for s in stages])
        axes[0].plot(right, left, ".", color=COLOURS[hashing], markersize=2, alpha=0.6, label=hashing)
    ends = [right[right > 0].min(), right.max()]
    axes[0].plot(ends, ends, color=SOFT, linewidth=1, label="eq. 12")
    axes[0].set(xscale="log", yscale="log", xlabel=f"right side of eq. 12, K = {counts[last]}",
                ylabel="mean squared error")  # fmt: skip
    for hashing in FAMILIES:
        colour = COLOURS[hashing]
        axes[1].plot(counts, [one["largest"] for one in numbers[hashing]], color=colour, marker="o", markersize=4,
                     label=f"{hashing}: largest")  # fmt: skip
        axes[1].plot(counts, [one["median"] for one in numbers[hashing]], color=colour, linestyle="--",
                     label=f"{hashing}: median")  # fmt: skip
        _band(axes[2], counts, [one["shared"] for one in numbers[hashing]], colour, hashing)
    axes[1].axhline(1, color=SOFT, linewidth=1)
    axes[1].set(xlabel="checkpoints K", ylabel="mean squared error over eq. 12", ylim=(0, None))
    axes[2].plot(counts, counts, color=SOFT, linestyle="--", label="K")
    axes[2].axhline(1, color=SOFT, linewidth=0.8)
    axes[2].set(xlabel="checkpoints K", ylabel="shared hashes over hashes of their own\n(mean squared error)")
    for axis in axes:
        axis.legend(fontsize=7)
    for axis in axes[1:]:
        axis.set_xticks(counts)
    _plain(axes[:1])
    return made


def search(trained: Sequence[Result], untrained: Sequence[Result], config: Config) -> Figure:
    """Error over score by the angle of a pair, and recall with and without re-ranking, against m."""
    made: Figure
    made, axes = figure(1, 3, width=13.0, height=4.0)
    part = config.search
    error, limit = (bin_errors(trained, f"{name}_balanced") for name in ("error", "limit"))
    borders = (0.0, *part.cosines)
    shown = [b for b in range(len(part.cosines)) if np.isfinite(error[:, b]).all()]
    for colour, b in zip(SERIES, shown, strict=False):
        axes[0].plot(part.sizes, error[:, b], color=colour, marker="o", markersize=3,
                     label=f"cosine {borders[b]:g} to {borders[b + 1]:g}")  # fmt: skip
        axes[0].plot(part.sizes, limit[:, b], color=colour, linestyle=":", linewidth=0.9)
    _doubling(axes[0], part.sizes, "sketch size m", "error over score (balanced, trained)\ndotted: bound")
    axes[0].set(yscale="log", ylim=(None, 30 * float(np.nanmax(limit))))  # room for the legend
    axes[0].axhline(1, color=SOFT, linewidth=0.8)
    table = recall_table(trained, "recall_balanced")
    for colour, j in zip(SERIES, range(len(part.candidates)), strict=False):
        name = "sketches alone" if j == 0 else f"{part.candidates[j]} candidates re-ranked"
        _band(axes[1], part.sizes, [row[j] for row in table], colour, name)
    for hashing in FAMILIES:
        for stages, line, of in ((trained, "-", "trained"), (untrained, "--", "untrained")):
            values = [row[0] for row in recall_table(stages, f"recall_steps_{hashing}")]
            _band(axes[2], part.sizes, values, COLOURS[hashing], f"{hashing}, {of}", line)
    for axis, what in ((axes[1], "sums (balanced, trained)"), (axes[2], "single steps, sketches alone")):
        _doubling(axis, part.sizes, "sketch size m", f"recall of the top {part.top}: {what}")
        axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize=7, ncols=2)
    for axis in axes[1:]:
        axis.legend(fontsize=7, handlelength=3)
    _plain(axes[:1])
    return made


def _kept(stages: Sequence[Result]) -> list[float]:
    """Share of the entries that are not zero, by level: mean over models."""
    return [float(np.mean([s["levels"][k]["kept"] for s in stages])) for k in range(len(stages[0]["levels"]))]


def _band(axis: Any, x: Sequence[float], values: Sequence[Estimate], colour: str, name: str, line: str = "-") -> None:
    """A line with its interval."""
    low, high = (np.array([getattr(v, end) for v in values]) for end in ("low", "high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, [v.value for v in values], color=colour, marker="o", markersize=3, linestyle=line, label=name)


def _plain(axes: Any) -> None:
    """Tick labels of logarithmic axes as plain numbers: math text is off, as labels hold data."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in axes:
        for side in (axis.xaxis, axis.yaxis):
            if side.get_scale() == "log":
                if side.get_transform().base != 2:
                    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                side.set_minor_formatter(NullFormatter())


def _doubling(axis: Any, x: Sequence[int], across: str, up: str) -> None:
    """A logarithmic axis with a tick at each value."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(v) for v in x])
    axis.set(xlabel=across, ylabel=up)
