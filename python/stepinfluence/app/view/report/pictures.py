"""Two charts of the report as PNG files, for pages that cannot hold the report itself (README, slides)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepinfluence.app.view.page import visible
from stepinfluence.app.view.report.data import Report
from stepinfluence.app.view.report.payload import find_peaks, signed, top_rows
from stepinfluence.attribution.periods import period_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, FAINT = "#1c1e21", "#5a6068", "#e3e1da"
HELPFUL, HARMFUL, ACCENT = "#0072b2", "#c94f00", "#3d4b5c"
LINES = 4
STYLE: Any = {  # its keys have a type of their own in some versions of matplotlib, not in others
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "text.parse_math": False,  # a "$" in an example is a dollar
}


def save_pictures(report: Report, folder: Path, *, query: int | None = None, prefix: str = "") -> list[Path]:
    """Write ``<prefix>trajectories.png`` and ``<prefix>profile.png`` for one query.

    Args:
        report: what to show.
        folder: existing folder.
        query: column; the report's first query by default.
        prefix: of the file names.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the ``report`` extra).
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    column = report.first_query if query is None else query
    paths = [folder / f"{prefix}trajectories.png", folder / f"{prefix}profile.png"]
    with mpl.rc_context(STYLE):
        for path, height in zip(paths, (4.4, 4.8), strict=True):
            figure = Figure(figsize=(9.6, height), dpi=160, layout="constrained")
            FigureCanvasAgg(figure)
            if path is paths[0]:
                _trajectories(report, column, figure.add_subplot())
            else:
                _profile(report, column, figure)
            figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return paths


def _trajectories(report: Report, column: int, axes: Axes) -> None:
    scores = report.sdi[:, column]
    helpful, harmful = top_rows(scores.sum(1), LINES)
    steps = np.arange(1, scores.shape[1] + 1)
    axes.axhline(0, color=FAINT, lw=1.2, zorder=0)
    for rows, color, style in ((helpful, HELPFUL, "-"), (harmful, HARMFUL, (0, (4, 2)))):
        for place, row in enumerate(rows):
            y = scores[row]
            peak = int(np.abs(y).argmax())
            label = f"{_short(report.train[row].text, 24)}  {signed(float(y.sum()))}"
            axes.plot(
                steps, y, color=color, ls=style, lw=2.4 - 0.4 * place, alpha=1 - 0.15 * place, label=label, zorder=3
            )
            axes.plot(steps[peak], y[peak], "o", color=color, ms=6, zorder=4)
    _step_axis(axes, report, column)
    axes.set_ylabel(f"influence at this step\n({report.unit})")
    axes.yaxis.set_major_formatter("{x:,.6g}")
    title = f"Training examples that shaped the answer to {_short(report.queries[column].text, 13)}"
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=18)
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


def _profile(report: Report, column: int, figure: Any) -> None:
    query = report.queries[column]
    profile, energy = report.sdi[:, column].sum(0), np.abs(report.sdi[:, column]).sum(0)
    steps = np.arange(1, len(profile) + 1)
    count = 1 if query.margin is None else 2
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].bar(steps, profile, width=0.7, color=[HELPFUL if v >= 0 else HARMFUL for v in profile])
    panels[0].step(steps, energy, where="mid", color=INK, lw=1.2)
    panels[0].set_ylabel(f"influence, all examples\n({report.unit})")
    panels[0].yaxis.set_major_formatter("{x:,.6g}")
    if query.margin is not None:
        panels[1].axhline(0, color=FAINT, lw=1.2, zorder=0)
        panels[1].plot(steps, query.margin, "o-", color=ACCENT, lw=2, ms=4)
        panels[1].set_ylabel("logit margin")
    rhythm = period_of(profile[: query.read_step])
    peaks = find_peaks(profile[: query.read_step]) if rhythm.found else []
    for number, axes in enumerate(panels):
        for step in peaks:
            axes.axvspan(step - 0.5, step + 0.5, color=FAINT, alpha=0.8, lw=0, zorder=-1)
        _step_axis(axes, report, column, note=number == 0, label=axes is panels[-1])
    title = f"Influence (bars: sum, line: regardless of sign) and logit margin on {_short(query.text, 13)}"
    panels[0].set_title(title, loc="left", fontsize=13, fontweight="bold", pad=18)
    figure.supxlabel(
        f"{rhythm.sentence('Summed influence')}.", fontsize=9, color=SOFT, x=0.02, ha="left"
    )


def _step_axis(axes: Axes, report: Report, column: int, *, note: bool = True, label: bool = True) -> None:
    steps = report.sdi.shape[2]
    read = report.queries[column].read_step
    axes.set_xlim(0.4, steps + 0.6)
    axes.set_xticks([1, *range(2 if steps <= 24 else 4, steps + 1, 2 if steps <= 24 else 4)])
    if label:
        axes.set_xlabel("loop step")
    if read is None:
        return
    axes.axvline(read, color=SOFT, ls=":", lw=1.4, zorder=1)
    if read < steps:
        axes.axvspan(read + 0.5, steps + 0.6, color="#00000012", lw=0, zorder=0)
    if note:
        axes.annotate(
            f"answer read at step {read}",
            (read, 1.01),
            xycoords=("data", "axes fraction"),
            ha="right" if read > 0.7 * steps else "center",
            va="bottom",
            fontsize=9,
            color=SOFT,
        )


def _short(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"
