"""From a :class:`~stepinfluence.app.view.report.data.Report` to one HTML file."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from stepinfluence.app.view.report.data import Report
from stepinfluence.app.view.report.payload import embed, payload, visible


def render_report(report: Report) -> str:
    """The page as a string (about 5 MB, most of it plotly.js).

    Its content security policy forbids the page to load anything and to run any script but its own.

    Raises:
        ModuleNotFoundError: plotly or jinja2 is not installed (the ``report`` extra).
    """
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    folder = resources.files("stepinfluence.app.view.report") / "assets"
    plotly, script = get_plotlyjs().replace("\r\n", "\n"), report_asset("report.js")  # as browsers read it
    environment = Environment(
        loader=FileSystemLoader(str(folder)), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    environment.filters["mib"] = lambda n: "–" if n is None else f"{n / 2**20:,.0f} MiB"
    environment.filters["seconds"] = lambda s: "–" if s is None else f"{s:.1f} s" if s < 100 else f"{s / 60:.1f} min"
    return environment.get_template("report.html.j2").render(
        report=report,
        style=report_asset("report.css"),
        plotly=plotly,
        script=script,
        data=embed(payload(report)),
        policy="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; script-src {allow(plotly)} {allow(script)}",
    )


def write_report(report: Report, path: Path) -> None:
    """Render the page into a file; errors as for :func:`render_report`."""
    path.write_text(render_report(report), encoding="utf-8")


def report_asset(name: str) -> str:
    return (resources.files("stepinfluence.app.view.report") / "assets" / name).read_text(encoding="utf-8")


def allow(script: str) -> str:
    """Source expression of an inline script: browsers run it only if its text has this digest."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
