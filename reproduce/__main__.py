"""``python -m reproduce``: the paper's experiments, our number beside the paper's. From a clone of the repository."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table
from stepinfluence.app.cli._common import Command, console, need_extra

from reproduce import EXPERIMENTS, SCALES

PROGRAM = "python -m reproduce"


class ReproduceCommand(Command):
    """Errors in one line that begins with this program's name."""

    program = PROGRAM


app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # with --debug, the plain traceback; without, one line (Command)
    context_settings={"help_option_names": ["-h", "--help"]},
)

HELP = (
    """Reproduce an experiment of the paper (arXiv 2602.10097), with our numbers beside the paper's.

[bold]Experiments[/bold]
"""
    + "".join(f"  [cyan]{name:<10}[/cyan] {entry.question}\n" for name, entry in EXPERIMENTS.items())
    + """
[bold]Scales[/bold]
"""
    + "".join(f"  [cyan]{name:<10}[/cyan] {what}\n" for name, what in SCALES.items())
    + """
Interrupted runs continue where they stopped when repeated with the same --out.

[bold]Examples[/bold]
  [cyan]python -m reproduce parity --scale minute --out /tmp/try[/cyan]
  [cyan]python -m reproduce fidelity --out my-fidelity[/cyan]
"""
)


@app.command(cls=ReproduceCommand, help=HELP)
def run(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="One of: " + ", ".join(EXPERIMENTS) + ".")],
    scale: Annotated[str, typer.Option(help="One of: " + ", ".join(SCALES) + ".")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder of the run. \\[default: sdi-EXPERIMENT-SCALE]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Instead of the profile's seed.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Your own file or folder, where the experiment takes some."),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="torch threads.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json; progress goes to stderr.")] = False,
) -> None:
    """See :data:`HELP`."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment: got {experiment!r}; use one of {', '.join(EXPERIMENTS)}")
    screen = console(json_output=as_json)
    with screen.status("starting"):
        import torch
        from stepinfluence.app.doctor import EXTRAS, missing_modules

        from reproduce.base import Run
        from reproduce.report import write_report
        from reproduce.style import styled

        need_extra("report,eval", missing_modules((*EXTRAS["report"], "scipy", "sklearn")), program=PROGRAM)
        package = EXPERIMENTS[experiment].package
        module = importlib.import_module(f"{package}.run")
        configs = importlib.import_module(f"{package}.config").CONFIGS
        if hasattr(module, "REQUIRES"):
            extra, modules = module.REQUIRES
            need_extra(extra, missing_modules(modules), program=PROGRAM)
    folder = out or Path(f"sdi-{experiment}-{scale}")
    config = _configure(configs, scale, seed=seed, data=data)
    if fresh:
        _clear(folder)
    numbers = iter(range(1, 1000))
    task: Run[Any] = Run(
        folder, experiment, scale, config, announce=lambda text: screen.print(f"[dim]{next(numbers)}[/dim] {text}")
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with styled():
            outcome = module.run(task)
        command = f"{PROGRAM} {experiment} --scale {scale} --seed {config.seed}"
        command += f" --data {data.name}" if data else ""  # where it lies is nobody else's concern
        report = write_report(task, outcome, command)
    finally:
        torch.set_num_threads(before)
    if as_json:
        typer.echo((folder / "results.json").read_text(encoding="utf-8"), nl=False)
        return
    screen.print(Markdown(f"# {outcome.title}\n\n{outcome.summary}"))
    table = Table("quantity", "ours", "paper", "where")
    for c in outcome.comparisons:
        table.add_row(c.name, _show(c.ours), _show(c.paper), c.where)
    screen.print(table)
    screen.print(f"Open {report}")


def _configure(configs: dict[str, Any], scale: str, *, seed: int | None, data: Path | None) -> Any:
    if scale not in configs:
        raise ValueError(f"scale: got {scale!r}; use one of {', '.join(configs)}")
    changes: dict[str, Any] = {} if seed is None else {"seed": seed}
    if data is not None:
        if "data" not in {f.name for f in dataclasses.fields(configs[scale])}:
            raise ValueError("data: this experiment makes its own data; leave --data out")
        changes["data"] = str(data)
    return dataclasses.replace(configs[scale], **changes)


def _clear(folder: Path) -> None:
    """Remove an earlier run; anything that does not look like one is not ours to remove."""
    if not folder.exists():
        return
    try:
        ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))["experiment"] in EXPERIMENTS
    except (OSError, ValueError, KeyError, TypeError):
        ours = not any(folder.iterdir())
    if not ours:
        raise ValueError(f"out: {folder} holds no earlier run, so --fresh does not touch it; choose another folder")
    shutil.rmtree(folder)


def _show(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    app(prog_name=PROGRAM)
