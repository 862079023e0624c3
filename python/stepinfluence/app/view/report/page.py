"""From a :class:`~stepinfluence.app.view.report.data.Report` to one HTML file."""

from __future__ import annotations

from pathlib import Path

from stepinfluence.app.view.page import render
from stepinfluence.app.view.report.data import Report
from stepinfluence.app.view.report.payload import payload
from stepinfluence.files import hand_out


def render_report(report: Report) -> str:
    """The page as a string; errors as for :func:`stepinfluence.app.view.page.render`."""
    filters = {
        "mib": lambda n: "–" if n is None else f"{n / 2**20:,.0f} MiB",
        "seconds": lambda s: "–" if s is None else f"{s:.1f} s" if s < 100 else f"{s / 60:.1f} min",
    }
    return render(__package__, "report", payload(report), filters=filters, report=report)


def write_report(report: Report, path: Path) -> None:
    """Render the page into a file; errors as for :func:`render_report` and :func:`hand_out`."""
    hand_out(path, lambda made: made.write_text(render_report(report), encoding="utf-8"))
