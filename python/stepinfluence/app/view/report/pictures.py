"""Two charts of the report as PNG files, for pages that cannot hold the report itself (README, slides)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from stepinfluence.app.view.report.data import Report
from stepinfluence.app.view.report.payload import find_peaks
from stepinfluence.attribution.periods import period_of
from stepinfluence.display import with_matplotlib as draw
from stepinfluence.display.style import ACCENT, FAINT, SOFT, STYLE
from stepinfluence.display.table import Hit
from stepinfluence.display.words import short, top_rows

LINES = 4


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
    column = report.first_query if query is None else query
    paths = [folder / f"{prefix}trajectories.png", folder / f"{prefix}profile.png"]
    with mpl.rc_context(STYLE):
        for path, height, fill in zip(paths, (4.4, 4.8), (_trajectories, _profile), strict=True):
            figure = draw.new_figure(height)
            fill(report, column, figure)
            figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15)
    return paths


def _trajectories(report: Report, column: int, figure: Any) -> None:
    axes = figure.add_subplot()
    scores = report.sdi[:, column]
    hits = [
        [Hit(row, report.train[row].id, report.train[row].text, float(scores[row].sum()), scores[row]) for row in rows]
        for rows in top_rows(scores.sum(1), LINES)
    ]
    draw.draw_trajectories(axes, *hits)
    _step_axis(axes, report, column)
    axes.set_ylabel(f"influence at this step\n({report.unit})")
    title = f"Training examples that shaped the answer to {short(report.queries[column].text, 13)}"
    axes.set_title(title, pad=18, **draw.TITLE)


def _profile(report: Report, column: int, figure: Any) -> None:
    query = report.queries[column]
    profile, energy = report.sdi[:, column].sum(0), np.abs(report.sdi[:, column]).sum(0)
    steps = np.arange(1, len(profile) + 1)
    count = 1 if query.margin is None else 2
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    draw.draw_profile(panels[0], profile, energy)
    panels[0].set_ylabel(f"influence, all examples\n({report.unit})")
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
    title = f"Influence (bars: sum, line: regardless of sign) and logit margin on {short(query.text, 13)}"
    panels[0].set_title(title, pad=18, **draw.TITLE)
    figure.supxlabel(f"{rhythm.sentence('Summed influence')}.", fontsize=9, color=SOFT, x=0.02, ha="left")


def _step_axis(axes: Axes, report: Report, column: int, *, note: bool = True, label: bool = True) -> None:
    steps = report.sdi.shape[2]
    read = report.queries[column].read_step
    draw.step_axis(axes, steps, label="loop step" if label else "")
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
