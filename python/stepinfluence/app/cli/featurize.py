"""``sdi featurize``: a project's examples, or a part of them, into a store of features."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stepinfluence.app.cli._common import (
    TRUST_HELP,
    console,
    damping_of,
    fail,
    interrupted,
    print_json,
    require_trust,
    shown,
)

if TYPE_CHECKING:
    from stepinfluence.app.runs import RunConfig, SplitReport, Worker

HELP = """Compute the features of a project's examples and keep them: featurize once, ask many times.

Each split becomes a store, RUN/SPLIT. The split "train" is summed over loop steps, all others have a row per step. \
Options that are not given are taken from the run in RUN, if there is one, so that a second split needs none.

Interrupted, killed or out of disk space? Repeat the command: it goes on where it stopped, and the result is the same \
to the last bit. Several processes share the work: start the same command under torchrun or srun.

[bold]Examples[/bold]
  [cyan]sdi featurize --project my_project.py --split train --split query --out run[/cyan]
  [cyan]sdi featurize -p my_project.py -s train --checkpoints 'ckpt/*.pt' -o run[/cyan]
  [cyan]sdi featurize -s more -o run[/cyan]                another split, same settings
  [cyan]sdi featurize --config run/config.yaml -o again[/cyan]  the same again
  [cyan]torchrun --nproc-per-node 8 -m stepinfluence featurize -s train -o run[/cyan]
"""
EPILOG = "Exit status: 0 done (or nothing left to do), 2 wrong use or input, 130 interrupted; stdout has only --json."

SPLIT_OPTIONS = ("per_step", "dtype", "batch_size", "shard_rows", "threads")

CurvatureSetting = Annotated[
    str | None,
    typer.Option(
        "--curvature", help="What query and explore show first: fisher, block, source or none. \\[default: fisher]"
    ),
]
DampingSetting = Annotated[
    str | None,
    typer.Option(
        "--damping",
        metavar="X",
        help="Of that curvature: training (1 / training's length), auto, or relative to the largest eigenvalue. "
        "\\[default: training where the checkpoints tell it, else auto]",
    ),
]


def run(
    project: Annotated[
        Path | None, typer.Option("--project", "-p", metavar="FILE", help="The project file (sdi init writes one).")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", "-s", metavar="NAME", help="Which examples; may be given repeatedly.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run; with --config, that file's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Repeat or go on with the run of this config.yaml.")
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Checkpoint files: a path or a quoted pattern, repeatable. Without: the weights of model().",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(metavar="X", help="Weight of each checkpoint. \\[default: its optimizer's learning rate]"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Inner product: sgd, or adam or adafactor from the optimizer state. \\[default: sgd]"),
    ] = None,
    sketch_size: Annotated[
        int | None, typer.Option(metavar="M", help="Buckets per parameter. \\[default: 2048]")
    ] = None,
    hashing: Annotated[str | None, typer.Option(help="balanced, or iid as in the paper. \\[default: balanced]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the sketches. \\[default: 0]")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="concat: columns for each parameter; sum: all share M columns. \\[default: concat]"),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Memory for what waits to be sketched. \\[default: by device]")
    ] = None,
    fold: Annotated[
        bool | None,
        typer.Option("--fold/--no-fold", help="Add all checkpoints into one set of columns. \\[default: no]"),
    ] = None,
    per_step: Annotated[
        bool | None,
        typer.Option("--per-step/--summed", help="A row per loop step, or their sum. \\[default: summed for train]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Stored as fp32, fp16, bf16 or int8. \\[default: fp32]")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", metavar="N", help="Examples per pass. \\[default: 32]")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Examples per shard. \\[default: as many as make 128 MiB]")
    ] = None,
    curvature: CurvatureSetting = None,
    damping: DampingSetting = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. \\[default: auto]")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads of this process. \\[default: torch's]")
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="stop at an example that fails, or skip it and record why. \\[default: stop]")
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on though code, data or losses have changed since; it is recorded."),
    ] = False,
    trust_project: Annotated[bool, typer.Option("--trust-project", help=TRUST_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report as JSON on stdout at the end.")] = False,
) -> None:
    """See :data:`HELP`."""
    given = {name: value for name, value in locals().items() if value is not None}
    screen = console(json_output=True)
    try:
        _run(screen, given, out, config, as_json=as_json)
    except KeyboardInterrupt as error:
        raise interrupted(error, "finished shards are kept; repeat the command to go on") from None


def _run(screen: Console, given: dict[str, Any], out: Path | None, config: Path | None, *, as_json: bool) -> None:
    project = given.get("project")
    if project is not None and not project.is_file():  # before anything is imported that takes a second
        fail(f"{project}: no such project file; sdi init writes one")
    if config is not None and not config.is_file():
        fail(f"config: {config} is no file; give the config.yaml of a run")
    with screen.status("starting"):
        from stepinfluence.app.project import Project
        from stepinfluence.app.runs import Prepared, Worker, run_splits
        from stepinfluence.app.runs.config import CONFIG

        worker = Worker.here()
        folder = out if out is not None else config.parent if config is not None else None
        if folder is None:
            fail("out: missing; name the run's folder: --out run")
        earlier = _read(folder / CONFIG)
        asked = _asked(given, _read(config) if config is not None else earlier)
    if "project" not in given:
        require_trust(config.parent if config is not None else folder, asked.project, trusted=given["trust_project"])
    with screen.status("starting"):
        prepared = Prepared(Project.load(asked.project), asked, worker.device(asked.device))
    terminal = sys.stderr.isatty()
    who = f"worker {worker.rank} of {worker.world_size}: " if worker.world_size > 1 else ""

    def on_start(split: str, rows: int) -> None:
        if worker.rank == 0:
            note = _checkpoints_note(prepared.count, bool(prepared.paths))
            per_step = "per step" if prepared.config.splits[split].per_step else "summed over steps"
            columns = f"{prepared.capture.width:,} columns {per_step}"
            body = ", ".join(prepared.capture.step_log.names.values())
            parameters = len(prepared.capture.targets)
            screen.print(f"[dim]loop body: {shown(body)} ({parameters} parameters)[/]", soft_wrap=True)
            screen.print(
                f"[dim]{shown(split)}: {rows:,} examples, {columns}, {note}, on {prepared.device}[/]", soft_wrap=True
            )

    reports = []
    for report in run_splits(
        prepared,
        folder,
        worker=worker,
        accept_changes=given["accept_changes"],
        progress=terminal and worker.local_rank == 0,
        on_start=on_start,
        log=None if terminal else lambda line: screen.print(f"{who}{shown(line)}", soft_wrap=True),
    ):
        reports.append(report)
        _say(screen, report, worker, who)
    if as_json and worker.rank == 0:
        print_json({"run": str(folder), "splits": [_json(report) for report in reports]})


def _read(path: Path) -> RunConfig | None:
    from stepinfluence.app.runs import RunConfig

    return RunConfig.load(path) if path.is_file() else None


def _asked(given: dict[str, Any], base: RunConfig | None) -> RunConfig:
    """The config of this call: what was given, over what the run's config (or defaults) say."""
    from stepinfluence.app.runs import RunConfig, SplitConfig
    from stepinfluence.errors import ConfigError

    names = given.get("split") or (list(base.splits) if base is not None and "config" in given else [])
    if not names:
        raise ConfigError("split: missing; say which examples: --split train")
    project = given.get("project") or (base.project if base is not None else None)
    if project is None:
        raise ConfigError("project: missing; name the project file: --project my_project.py (sdi init writes one)")
    if "damping" in given:
        given = {**given, "damping": damping_of(given["damping"])}
    own = {name: given[name] for name in SPLIT_OPTIONS if name in given}
    splits = {}
    for name in names:
        before = base.splits.get(name) if base is not None else None
        splits[name] = dataclasses.replace(before or SplitConfig(), **own)
    shared = {
        f.name: given[f.name]
        for f in dataclasses.fields(RunConfig)
        if f.name in given and f.name not in ("project", "splits", "checkpoints")
    }
    if "checkpoints" in given:
        shared["checkpoints"] = tuple(given["checkpoints"])
    if base is None:
        return RunConfig(project=project, splits=splits, **shared)
    return dataclasses.replace(base, project=project, splits=splits, **shared)


def _checkpoints_note(count: int, from_files: bool) -> str:
    if not from_files:
        return "at the weights that model() returns (no --checkpoints), eta 1"
    return f"{count} checkpoint{'s' * (count > 1)}"


def _say(screen: Console, report: SplitReport, worker: Worker, who: str) -> None:
    name = f"{who}[bold]{shown(report.path)}[/bold]"
    failed = f", {len(report.failed):,} failed" if report.failed else ""
    if report.complete:
        done = f"complete: {report.rows:,} examples{failed}"
        if not report.written:
            done += "; nothing left to do"
        else:
            done += f" in {report.seconds:.1f} s"
    else:
        done = f"wrote {report.written} shards in {report.seconds:.1f} s; {report.missing} are still missing{failed}"
    screen.print(f"{name} {done}", soft_wrap=True)
    for row, reason in list(report.failed.items())[:3] if worker.rank == 0 else []:
        screen.print(f"  [yellow]row {row}[/yellow]: {shown(reason)}", soft_wrap=True)


def _json(report: SplitReport) -> dict[str, Any]:
    return {
        "split": report.split,
        "store": str(report.path),
        "rows": report.rows,
        "complete": report.complete,
        "shards_written": report.written,
        "shards_missing": report.missing,
        "failed": [{"row": row, "reason": reason} for row, reason in report.failed.items()],
        "seconds": round(report.seconds, 3),
    }
