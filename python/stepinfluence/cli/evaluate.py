"""``sdi evaluate``: attribution methods against retraining, on small looped problems or on yours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from stepinfluence.cli._common import console, fail, need_extra

PROBLEMS = ("adder", "majority")
HELP = """Compare attribution methods with what retraining says: which scores deserve trust?

Linear datamodeling score, leave-one-out correlation, planted label errors, brittleness, overlap with exact TracIn,
a randomisation check, and two step-resolved ones: conservation, and the loss change that a training step at one loop
step alone makes. With confidence intervals. Models are retrained about a hundred times.

[bold]Problems[/bold]
  [cyan]adder[/cyan]      sum of four digits modulo 3, by a looped transformer that trains in seconds
  [cyan]majority[/cyan]   which of two symbols is more frequent

For a problem of your own call [cyan]stepinfluence.evaluation.evaluate(Problem(...))[/cyan] in Python.

[bold]Examples[/bold]
  [cyan]sdi evaluate adder[/cyan]
  [cyan]sdi evaluate majority --subsets 64 --out majority.json[/cyan]
"""


def run(
    problem: Annotated[str, typer.Argument(metavar="PROBLEM", help="One of: " + ", ".join(PROBLEMS) + ".")],
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Only this one; repeat for several.")
    ] = None,
    subsets: Annotated[int, typer.Option(metavar="N", min=3, help="Models for the datamodeling score.")] = 32,
    left_out: Annotated[int, typer.Option(metavar="N", min=2, help="Examples left out one at a time.")] = 12,
    flips: Annotated[int, typer.Option(metavar="N", min=0, help="Queries for the brittleness.")] = 6,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of data, draws and training.")] = 0,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="torch threads.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write all figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """See :data:`HELP`."""
    if problem not in PROBLEMS:
        fail(f"problem: got {problem!r}; use one of {', '.join(PROBLEMS)}")
    screen = console(json_output=as_json)
    with screen.status("starting"):
        import torch

        from stepinfluence.doctor import machine_facts, missing_modules, versions

        need_extra("eval", missing_modules(("scipy", "sklearn")))
        from stepinfluence.evaluation import evaluate
        from stepinfluence.evaluation.builtin import make_problem
        from stepinfluence.evaluation.methods import available
    known = available()
    unknown = [m for m in methods or () if m not in known]
    if unknown:
        fail(f"method: got {unknown[0]!r}; use one of {', '.join(known)}")
    chosen = {name: known[name] for name in methods} if methods else known
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = make_problem(problem, seed=seed)
        found = evaluate(made, chosen, subsets=subsets, left_out=left_out, flips=flips, seed=seed)
    finally:
        torch.set_num_threads(before)
    settings = {"problem": problem, "subsets": subsets, "left_out": left_out, "flips": flips, "seed": seed}
    text = json.dumps(
        {"settings": settings, **found.to_dict(), "machine": machine_facts(), "versions": versions()}, indent=1
    )
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    screen.print(
        f"{problem}: {len(made.train)} training examples, {len(made.queries)} queries, {found.retrainings} models"
    )
    screen.print(Markdown(found.markdown()))
