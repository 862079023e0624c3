"""``sdi doctor``: what this machine has, and what will therefore be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from stepinfluence.app.cli._common import console

if TYPE_CHECKING:
    from stepinfluence.app.doctor import Diagnosis


HELP = """Tell what this machine has (versions, CPU, GPU, compiled kernels) and what will be used.

Include its output in a bug report.
"""


def run(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs instead of tables.")] = False,
) -> None:
    """See :data:`HELP`."""
    with console(json_output=True).status("looking at this machine"):
        from stepinfluence.app.doctor import diagnose

        found = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    _show(found)


def _show(found: Diagnosis) -> None:
    out = console()
    for title, facts in (
        ("Versions", found.versions),
        ("Machine", found.machine),
        ("Sketches run on", found.kernels),
    ):
        out.print(_facts(title, facts))
        out.print()
    table = Table(
        title="Route for typical layers (sketch size 2048), estimated time of each",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    routes = list(dict.fromkeys(route for plan in found.plans for route in plan.seconds))
    for column in ("layer", "shape", "device", "route"):
        table.add_column(column, style="bold cyan" if column == "route" else "", header_style="dim")
    for route in routes:
        table.add_column(f"{route}, ms", justify="right", header_style="dim")
    for plan in found.plans:
        estimates = [f"{1e3 * plan.seconds[r]:.3g}" if r in plan.seconds else "–" for r in routes]
        table.add_row(plan.layer, plan.shape, plan.device, plan.route, *estimates)
    out.print(table)
    out.print()
    for line in found.advice:
        out.print(Text.assemble(("! ", "yellow"), line), soft_wrap=True)  # to be copied: brackets and all, in one line
    if not found.advice:
        out.print("[green]✓[/green] nothing to mend")


def _facts(title: str, facts: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="dim", min_width=14)
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, value, style="yellow" if value == "not installed" else "")
    return table
