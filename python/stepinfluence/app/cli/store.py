"""``sdi store``: look at feature stores, check them, put them together, hand them on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepinfluence.app.cli._common import (
    FAILED_CHECK,
    SubCommand,
    SubGroup,
    console,
    fail,
    print_json,
    require_output,
    shown,
)

if TYPE_CHECKING:
    from stepinfluence.store import Store

HELP = """Feature stores: what they hold, whether they are whole, merging and exporting them.

[bold]Examples[/bold]
  [cyan]sdi store info run[/cyan]                              all stores of a run
  [cyan]sdi store verify run/train[/cyan]                      read every byte
  [cyan]sdi store verify run --report run/report.html[/cyan]   and check a report
  [cyan]sdi store merge part-a/train part-b/train --out run/train[/cyan]
  [cyan]sdi store export run/train train.npz[/cyan]            for numpy
"""
EPILOG = "Exit status: 0 all well, 1 verify found problems, 2 wrong use or input."

app = typer.Typer(cls=SubGroup, no_args_is_help=True, rich_markup_mode="rich")
Stores = Annotated[list[Path], typer.Argument(metavar="STORE", help="Folders of stores, or of runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _stores(paths: list[Path]) -> list[Path]:
    """The stores themselves, or all that are in a run's folder."""
    found = []
    for path in paths:
        if not path.is_dir():
            fail(f"{path}: no store here (no such folder)")
        inside = sorted(p.parent for p in path.glob("*/manifest.json"))
        found += [path] if (path / "manifest.json").is_file() or not inside else inside
    return found


@app.command(
    "info", cls=SubCommand, help="What stores hold: rows, columns, checkpoints, settings, bytes, and what is missing."
)
def info(stores: Stores, as_json: Json = False) -> None:
    """Print a table, or JSON."""
    folders = _stores(stores)
    with console(json_output=True).status("reading"):
        from rich.table import Table

        from stepinfluence.store import Store

        opened = [Store.open(path) for path in folders]
    if as_json:
        print_json([_facts(store) for store in opened])
        return
    screen = console()
    for store in opened:
        facts = _facts(store)
        table = Table(title=shown(store.path), title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _lines(facts):
            table.add_row(name, value if name == "state" else shown(value))
        screen.print(table)
        screen.print()


def _facts(store: Store) -> dict[str, Any]:
    m = store.manifest
    return {
        "store": str(store.path),
        "rows": m.n_rows,
        "failed": len(store.failed),
        "complete": store.complete,
        "shards": {"total": m.n_shards * len(store.checkpoints), "missing": store.missing_count, "rows": m.shard_rows},
        "per_step": store.per_step,
        "steps": store.steps if store.per_step else None,
        "width": store.width,
        "dtype": m.dtype,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "layout": m.layout,
        "sketch": None
        if m.sketch is None
        else {"sizes": sorted(set(m.sketch.sizes.values())), "hashing": m.sketch.hashing, "seed": m.sketch.seed},
        "checkpoints": [{"name": c.name, "eta": c.eta, "metric": bool(c.space.metric)} for c in store.checkpoints],
        "training": _training(store),
        "fold": None if m.fold is None else [part["name"] for part in m.fold["checkpoints"]],
        "project": dict(m.project),
        "versions": dict(m.versions),
    }


def _training(store: Store) -> dict[str, Any]:
    """Training's length by each checkpoint, or why it is not known."""
    from stepinfluence.attribution.curvature.stored import known_time

    try:
        return {"time": known_time(store).times, "unknown": None}
    except ValueError as error:
        return {"time": None, "unknown": str(error)}


def _said(training: dict[str, Any]) -> str:
    if training["time"] is None:
        return f"length not known ({training['unknown']})"
    return f"length {', '.join(f'{time:.3g}' for time in training['time'][:6])} (learning rates times Adam's gain)"


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    shards, sketch, rows = facts["shards"], facts["sketch"], facts["rows"]
    state = "complete" if facts["complete"] else f"[yellow]{shards['missing']} of {shards['total']} shards missing[/]"
    steps = f"per loop step ({facts['steps']} steps)" if facts["per_step"] else "summed over loop steps"
    size = facts["bytes"]
    checkpoints = facts["checkpoints"]
    names = ", ".join(f"{c['name']} (eta {c['eta']:.3g})" for c in checkpoints[:6])
    return [
        ("state", state),
        ("rows", f"{rows:,}" + (f", {facts['failed']:,} of them failed" if facts["failed"] else "")),
        ("a row", f"{facts['width']:,} columns of {facts['dtype']}, {steps}"),
        ("size", f"{size / 2**20:,.1f} MiB" + (f", {size / rows / 1024:,.1f} KiB a row" if rows else "")),
        (
            "sketches",
            "none (exact gradients)"
            if sketch is None
            else f"{'/'.join(map(str, sketch['sizes']))} buckets, {sketch['hashing']}, seed {sketch['seed']}, "
            f"{facts['layout']}",
        ),
        ("checkpoints", names + (f" and {len(checkpoints) - 6} more" if len(checkpoints) > 6 else "")),
        *([("folded from", ", ".join(facts["fold"]))] if facts["fold"] else []),
        ("training", _said(facts["training"])),
        ("metric", "an optimizer's second moments" if any(c["metric"] for c in checkpoints) else "plain gradients"),
        ("project", ", ".join(f"{key} {value}" for key, value in facts["project"].items()) or "unknown"),
        ("versions", ", ".join(f"{key} {value}" for key, value in facts["versions"].items())),
    ]


@app.command(
    "verify",
    cls=SubCommand,
    help="Read every byte of stores, and of a run's score table; exit status 1 and one line per problem, if any.",
)
def verify(
    stores: Stores,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also check a file of sdi report against the (one) run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print problems on stdout, one a line."""
    folders = _stores(stores)
    if report is not None and (len(stores) != 1 or folders == stores):
        fail("report: goes with one run's folder, the one that the report was made from")
    with console(json_output=True).status("starting"):
        from stepinfluence.app.runs.scores import SCORES, description_path, scores_problem
        from stepinfluence.store import verify as find_problems
    found: dict[str, list[str]] = {}
    for path in folders:
        found[str(path)] = find_problems(path, progress=sys.stderr.isatty())
    for table in (path / SCORES for path in stores):
        if table.is_file() or description_path(table).is_file():
            problem = scores_problem(table)
            found[str(table)] = [] if problem is None else [problem]
    if report is not None:
        found[str(report)] = _report_problems(stores[0], report)
    if as_json:
        print_json(found)
    else:
        for name, problems in found.items():
            for problem in problems:
                typer.echo(problem)
            if not problems:
                console(json_output=True).print(f"{shown(name)}: all well", soft_wrap=True)
    if any(found.values()):
        raise typer.Exit(FAILED_CHECK)


def _report_problems(run: Path, report: Path) -> list[str]:
    """What of a report does not fit a run's stores."""
    from stepinfluence.app.view.explore import Explorer
    from stepinfluence.app.view.explore.audit import problems, splits

    train, query = splits(report)
    return problems(Explorer.open(run, train=train, query=query), report)


@app.command(
    "merge",
    cls=SubCommand,
    help="One store of the shards that several hold: parts of one run, written in different places.",
)
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE", help="Stores with one manifest.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STORE", help="The merged store.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy files, rather than link to them where possible.")] = False,
) -> None:
    """Merge, and say what is still missing."""
    with console(json_output=True).status("starting"):
        from stepinfluence.store import merge as put_together
    merged = put_together(stores, out, link=not copy, progress=sys.stderr.isatty())
    missing = merged.missing_count
    state = "complete" if not missing else f"{missing} shards still missing"
    console(json_output=True).print(f"{shown(out)}: {len(merged):,} rows, {state}", soft_wrap=True)


@app.command(
    "export", cls=SubCommand, help="Write a store's content to one file that other programs read: .npz or .safetensors."
)
def export(
    store: Annotated[Path, typer.Argument(metavar="STORE")],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .npz or .safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
) -> None:
    """Export."""
    fmt = out.suffix.removeprefix(".")
    if fmt not in ("npz", "safetensors"):
        fail(f"{out}: the format goes by the file's name; end it in .npz or .safetensors")
    if out.exists() and not force:
        fail(f"{out}: exists; give another name, or --force to write over it")
    require_output(out, ".npz", ".safetensors")
    with console(json_output=True).status("writing"):
        from stepinfluence.store import export as write_out

        write_out(store, out, "npz" if fmt == "npz" else "safetensors")
    size = f"{out.stat().st_size / 2**20:,.1f} MiB"
    console(json_output=True).print(f"wrote {shown(out)} ({size})", soft_wrap=True)
