"""Figures of the fidelity experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reproduce.arrays import Array
from reproduce.fidelity.statistics import spread_evenly
from reproduce.style import INK, SERIES, SOFT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = {"sdi": (2048, 0.0388, 0.0030), "tracin": (2048, 0.0220, 0.0052)}
"""m, mean and standard deviation as printed in the paper's section 4."""


def errors(sizes: Sequence[int], tables: Mapping[str, Mapping[str, Array]], at: int) -> Figure:
    """Error against sketch size on logarithmic axes, with the paper's points (Fig. 4)."""
    made: Figure
    made, axes = figure(1, 2, width=9.0, height=3.8, sharey=True)
    for axis, key, title in zip(axes, ("sdi", "tracin"), ("SDI", "TracIn"), strict=True):
        for family, colour, marker in (("iid", SERIES[1], "s"), ("balanced", SERIES[0], "o")):
            values = tables[family][key]
            axis.errorbar(
                sizes, values.mean(1), values.std(1, ddof=1), color=colour, marker=marker, markersize=4, capsize=3,
                linewidth=1.4, label=f"{family} hashing",
            )  # fmt: skip
        start = tables["iid"][key].mean(1)[at] * (np.asarray(sizes) / sizes[at]) ** -0.5
        axis.plot(sizes, start, color=SOFT, linestyle=":", linewidth=1, label="slope -1/2")
        m, mean, spread = PAPER[key]
        if m in sizes:  # its model is another at the small scale; there is nothing to set beside it
            beside = {"color": INK, "marker": "D", "markersize": 5, "capsize": 3, "linestyle": "none"}
            axis.errorbar([m * 1.08], [mean], [spread], label=f"paper, m = {m}", **beside)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(s) for s in sizes])
        axis.minorticks_off()
        axis.set_yticks(_nice(axis.get_ylim()), [f"{v:g}" for v in _nice(axis.get_ylim())])
        axis.set_xlabel("sketch size m")
        axis.set_title(title, loc="left")
    axes[0].set_ylabel("relative error (Frobenius)")
    axes[0].legend()
    return made


def trajectories(exact: Array, sketched: Array, size: int) -> Figure:
    """Exact and sketched trajectories of a self pair and of the strongest pair of different examples.

    Args:
        exact: ``(B, B, steps)``.
        sketched: ``(seeds, B, B, steps)``.
        size: m.
    """
    made: Figure
    made, axes = figure(1, 2, width=9.0, height=3.6)
    steps = np.arange(1, exact.shape[-1] + 1)
    strength = np.abs(exact.sum(-1))
    np.fill_diagonal(strength, 0)
    pair = divmod(int(strength.argmax()), len(strength))
    for axis, (row, column) in zip(axes, ((0, 0), pair), strict=True):
        _trajectory(axis, steps, exact[row, column], sketched[:, row, column], size)
        who = "an example on itself" if row == column else f"example {row + 1} on example {column + 1}"
        axis.set_title(f"Influence of {who}", loc="left")
        axis.set_xlabel("loop step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("influence")
    axes[0].legend()
    return made


def _trajectory(axis: Any, steps: NDArray[np.int64], exact: Array, sketched: Array, size: int) -> None:
    mean, spread = sketched.mean(0), sketched.std(0, ddof=1)
    axis.axhline(0, color=SOFT, linewidth=0.6)
    axis.fill_between(steps, mean - spread, mean + spread, color=SERIES[0], alpha=0.25, linewidth=0,
                      label=f"sketched, m = {size}: mean ± sd over seeds")  # fmt: skip
    axis.plot(steps, mean, color=SERIES[0], linewidth=1)
    axis.plot(steps, exact, color=INK, marker="o", markersize=3, linestyle="none", label="exact")
    axis.plot(steps, spread_evenly(exact), color=SERIES[1], linestyle="--", linewidth=1,
              label="TracIn, shared equally")  # fmt: skip


def _nice(limits: tuple[float, float]) -> list[float]:
    values = [k * 10.0**e for e in range(-6, 2) for k in (1, 2, 5)]
    return [v for v in values if limits[0] <= v <= limits[1]]
