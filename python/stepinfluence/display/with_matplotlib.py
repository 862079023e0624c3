"""Figures of influence over loop steps by matplotlib, made without pyplot: they open no window and need no closing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stepinfluence.display.style import FAINT, HARMFUL, HELPFUL, INK, SOFT, STYLE
from stepinfluence.display.table import Hit
from stepinfluence.display.words import signed

TITLE: dict[str, Any] = {"loc": "left", "fontsize": 13, "fontweight": "bold"}


class Shown(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
        return buffer.getvalue()


def new_figure(height: float) -> Shown:
    """An empty figure; to be filled within :data:`STYLE`."""
    figure = Shown(figsize=(9.6, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def trajectories(helpful: Sequence[Hit], harmful: Sequence[Hit], title: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = new_figure(4.4)
        axes = figure.add_subplot()
        draw_trajectories(axes, helpful, harmful)
        step_axis(axes, max((len(hit.trajectory) for hit in [*helpful, *harmful]), default=1))
        axes.set_ylabel("influence at this step")
        axes.set_title(title, **TITLE)
    return figure


def profile(total: NDArray[Any], energy: NDArray[Any], title: str, *, places: NDArray[Any], axis: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        draw_profile(axes, total, energy, places)
        if places[0] == 1:
            step_axis(axes, len(total), label=axis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(axis)
        axes.set_ylabel("influence at this step")
        axes.set_title(title, **TITLE)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def heatmap(values: NDArray[Any], labels: Sequence[str], title: str, across: str, down: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = new_figure(1.6 + 0.24 * len(values))
        axes = figure.add_subplot()
        most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        edges = np.arange(values.shape[1] + 1) + 0.5, np.arange(len(values) + 1) - 0.5
        mesh = axes.pcolormesh(*edges, values, cmap="RdBu", vmin=-most, vmax=most, rasterized=True)
        axes.invert_yaxis()
        axes.set_yticks(range(len(labels)), labels, fontsize=8.5, family="DejaVu Sans Mono")
        step_axis(axes, values.shape[1], label=across)
        axes.set_ylabel(down)
        axes.set_title(title, **TITLE)
        figure.colorbar(mesh, ax=axes, label="influence: blue helps, red harms")
    return figure


def draw_trajectories(axes: Axes, helpful: Sequence[Hit], harmful: Sequence[Hit]) -> None:
    """One line for each example, solid where it helps, with its peak marked, and a legend of texts and totals."""
    axes.axhline(0, color=FAINT, lw=1.2, zorder=0)
    for hits, color, style in ((helpful, HELPFUL, "-"), (harmful, HARMFUL, (0, (4, 2)))):
        for place, hit in enumerate(hits):
            y = hit.trajectory
            fade = 1 - 0.7 * place / max(4, len(hits))
            axes.plot(
                np.arange(1, len(y) + 1), y, color=color, ls=style, lw=2.4 * fade, alpha=0.4 + 0.6 * fade,
                label=f"{hit.label}  {signed(hit.total)}", zorder=3,
            )  # fmt: skip
            axes.plot(hit.peak_step, y[hit.peak_step - 1], "o", color=color, ms=6, zorder=4)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    legend = axes.legend(
        title="solid: helps   dashed: harms   (total)",
        frameon=False,
        prop={"family": "DejaVu Sans Mono", "size": 8.5},
        title_fontsize=9,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        alignment="left",
        handlelength=3,
    )
    legend.get_title().set_color(SOFT)


def draw_profile(axes: Axes, total: NDArray[Any], energy: NDArray[Any], places: NDArray[Any] | None = None) -> None:
    """The sum over examples as bars, and regardless of sign as a line; at steps 1, 2, ... unless places are given."""
    steps = np.arange(1, len(total) + 1) if places is None else places
    apart = float(steps[1] - steps[0]) if len(steps) > 1 else 1.0
    colors = [HELPFUL if v >= 0 else HARMFUL for v in total]
    axes.bar(steps, total, width=0.7 * apart, color=colors, label="sum over examples")
    axes.step(steps, energy, where="mid", color=INK, lw=1.2, label="regardless of sign")
    axes.yaxis.set_major_formatter("{x:,.6g}")


def step_axis(axes: Axes, steps: int, *, label: str = "loop step") -> None:
    axes.set_xlim(0.4, steps + 0.6)
    every = 1 if steps <= 12 else 2 if steps <= 24 else 4
    axes.set_xticks([1, *range(1 + every if every == 1 else every, steps + 1, every)])
    axes.set_xlabel(label)
