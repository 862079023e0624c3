"""``sdi explore`` and ``sdi report``: a run's influence in a browser."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepinfluence.app.cli._common import (
    TRUST_HELP,
    DampingOption,
    console,
    damping_of,
    fail,
    need_extra,
    require_output,
    require_run,
    require_trust,
    shown,
)

if TYPE_CHECKING:
    from stepinfluence.app.runs.curvatures import Correction
    from stepinfluence.app.view.explore.model import RunModel
    from stepinfluence.store import Store

EXPLORE_HELP = """Look at a run in a browser: queries, the examples that helped or harmed, and at which loop step.

Starts a server on this machine that reads RUN and nothing else; Ctrl-C stops it. "Recompute exactly" and "Influence \
by token" run the model: of a run that was not written here, only with [cyan]--trust-project[/cyan].

[bold]Examples[/bold]
  [cyan]sdi explore my-run[/cyan]
  [cyan]sdi explore my-run --query test --port 8080 --no-open[/cyan]
"""
REPORT_HELP = """Write a run's influence into one HTML file, to keep or to send.

The file needs no network and no server. It holds the leading examples of the first queries; for all of them use
[cyan]sdi explore[/cyan]. It names the stores it was made from by their digests.

[bold]Examples[/bold]
  [cyan]sdi report my-run --out influence.html[/cyan]
  [cyan]sdi report my-run --queries 5 --exact --tokens[/cyan]   and what the model computes
  [cyan]sdi report my-run --id q17 --out q17.html[/cyan]        one answer's audit trail:
  [cyan]sdi store verify my-run --report q17.html[/cyan]        does it fit the stores?
"""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that sdi featurize wrote.")]
Train = Annotated[str, typer.Option(metavar="SPLIT", help="Split of the training examples.")]
Query = Annotated[str, typer.Option(metavar="SPLIT", help="Split of the queries. \\[default: the other one]")]
Kind = Annotated[
    str | None,
    typer.Option(
        "--curvature",
        metavar="KIND",
        help="Corrected for curvature by fisher or block, or through training by source (of several checkpoints), "
        "beside SDI; none: SDI alone. \\[default: the run's setting]",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs, for what is computed from it. \\[default: the run's]")
]
Trust = Annotated[bool, typer.Option("--trust-project", help=TRUST_HELP)]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")]


def explore(
    run: Run,
    train: Train = "train",
    query: Query = "",
    curvature: Kind = None,
    damping: DampingOption = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any free one.")] = 0,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen on. Others than this machine can read the run then.")
    ] = "127.0.0.1",
    device: Device = None,
    trust_project: Trust = False,
    open_: Open = True,
) -> None:
    """See :data:`EXPLORE_HELP`."""
    if not host:
        fail("host: got ''; give an address to listen on, such as 127.0.0.1")
    require_run(run)
    screen = console()
    with screen.status("starting"):
        from stepinfluence.app.doctor import EXTRAS, missing_modules

        need_extra("explore,report", missing_modules((*EXTRAS["explore"], "plotly", "jinja2")))
        from stepinfluence.app.view.explore import Explorer
        from stepinfluence.app.view.explore.serve import serve

        model, why = _model(run, device, trusted=trust_project)
        explorer = Explorer.open(
            run, train=train, query=query, curvatures=_curvatures(run, curvature, damping), model=model, no_model=why
        )

    def ready(address: str) -> None:
        screen.print(f"{shown(run)}: open [bold link={address}]{address}[/] (Ctrl-C stops)")
        if open_:
            webbrowser.open(address)

    serve(explorer, host=host, port=port, ready=ready)


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="\\[default: RUN/report.html]")
    ] = None,
    train: Train = "train",
    query: Query = "",
    curvature: Kind = None,
    damping: DampingOption = None,
    queries: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1000, help="How many queries the file holds. \\[default: 50]"),
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="This query only; repeatable.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Also recompute the influence of the leading examples from the model.")
    ] = False,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Also the influence of single tokens of the first examples, from the model."),
    ] = False,
    device: Device = None,
    trust_project: Trust = False,
    open_: Open = False,
) -> None:
    """See :data:`REPORT_HELP`."""
    if queries is not None and ids:
        fail("queries: the file holds those of --id; leave one of the two out")
    if device is not None and not (exact or tokens):
        fail("device: is where the model runs, for --exact and --tokens; without them, it does not")
    require_run(run)
    path = out or run / "report.html"
    require_output(path, ".html", ".htm")
    screen = console()
    model, why = None, ""
    if exact or tokens:
        from stepinfluence.app.runs.stored import StoredRun

        require_trust(run, StoredRun.open(run).config.project, trusted=trust_project)
        model, why = _model(run, device, trusted=True)
    with screen.status("starting"):
        from stepinfluence.app.doctor import missing_modules

        need_extra("report", missing_modules(("plotly", "jinja2")))
        from stepinfluence.app.view.explore import Explorer, write_page

        explorer = Explorer.open(
            run, train=train, query=query, curvatures=_curvatures(run, curvature, damping), model=model, no_model=why
        )
    rows = [explorer.query.find(i) for i in ids] if ids else None
    quiet = not sys.stderr.isatty()
    write_page(explorer, path, queries=queries or 50, rows=rows, exactly=exact, by_token=tokens, progress=not quiet)
    screen.print(f"Open {shown(path)}")
    if open_:
        webbrowser.open(path.resolve().as_uri())


def _curvatures(run: Path, kind: str | None, damping: str | None) -> Callable[[Store], tuple[Correction | None, str]]:
    """What fits (or finds) the curvatures of a run's training store."""
    from stepinfluence.app.runs.curvatures import curvatures_to_show

    number = damping_of(damping)
    return lambda store: curvatures_to_show(run, store, kind, number)


def _model(run: Path, device: str | None, *, trusted: bool) -> tuple[RunModel | None, str]:
    """What answers from the run's model, where its project file may be run; else None, and why not."""
    from stepinfluence.app.runs.stored import StoredRun
    from stepinfluence.app.runs.trust import is_written_here, mark
    from stepinfluence.app.view.explore.model import RunModel
    from stepinfluence.errors import ConfigError

    opened = StoredRun.open(run, device=device)
    try:
        project = opened.config.project
    except ConfigError as error:
        return None, str(error)
    if trusted:
        mark(run, project)
    elif not is_written_here(run, project):
        return None, (
            f"this run was not written here by you, and that runs the code of {project}: look at it, then start "
            "sdi explore with --trust-project"
        )
    return RunModel(opened), ""
