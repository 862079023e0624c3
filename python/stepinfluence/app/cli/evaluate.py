"""``sdi evaluate``: attribution methods against retraining, on small looped problems or on yours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepinfluence.app.cli._common import console, fail, need_extra, require_output, shown

PROBLEMS = ("adder", "majority", "language", "parity", "trm")
HELP = """Compare attribution methods with what retraining says: which scores deserve trust?

Linear datamodeling score, leave-one-out correlation, planted label errors, \
brittleness, overlap with exact TracIn, a randomisation check, and two \
step-resolved ones: conservation, and the loss change that a training step at \
one loop step alone makes.

One training run says little: another initialisation, or another machine's \
rounding, gives other figures. So everything is repeated over [cyan]--seeds[/cyan], each \
with models, random halves and left-out examples of its own, and the table \
shows the mean over seeds with its 95 % interval over seeds. What cannot be \
told from chance is named below it.

Some hundred small models are trained, which takes minutes to an hour. Each is \
kept in [cyan]--folder[/cyan]: the same command goes on where it was stopped, and another \
method is scored without training again.

[bold]Problems[/bold]
  [cyan]adder[/cyan]      sum of four digits modulo 3; trains in seconds
  [cyan]majority[/cyan]   which of two symbols is more frequent
  [cyan]language[/cyan]   next character of Python's own help texts
  [cyan]parity[/cyan]     odd number of ones? the paper's looped model
  [cyan]trm[/cyan]        Sudokus of four by four, by the package tiny-recursive-model

For a problem of your own call [cyan]stepinfluence.evaluation.evaluate(Problem(...))[/cyan] \
in Python.

[bold]Examples[/bold]
  [cyan]sdi evaluate adder[/cyan]
  [cyan]sdi evaluate adder --method TRAK[/cyan]   with the models that are there
  [cyan]sdi evaluate majority --seeds 10 --subsets 32 --out majority.json[/cyan]
"""


def run(
    problem: Annotated[str, typer.Argument(metavar="PROBLEM", help="One of: " + ", ".join(PROBLEMS) + ".")],
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Only this one; repeat for several.")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=2, help="Independent runs that intervals are over.")] = 5,
    subsets: Annotated[int, typer.Option(metavar="N", min=3, help="Models of a seed for the datamodeling score.")] = 8,
    left_out: Annotated[int, typer.Option(metavar="N", min=2, help="Examples of a seed left out one at a time.")] = 6,
    flips: Annotated[int, typer.Option(metavar="N", min=0, help="Queries of a seed for the brittleness.")] = 1,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Initialisations that every retraining is averaged over.")
    ] = 2,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where trained models are kept; evaluate-PROBLEM if not given.")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=4096, help="torch threads.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write all figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr.")] = False,
) -> None:
    """See :data:`HELP`."""
    if problem not in PROBLEMS:
        fail(f"problem: got {problem!r}; use one of {', '.join(PROBLEMS)}")
    if out is not None:
        require_output(out, ".json")
    screen = console(json_output=as_json)
    with screen.status("starting"):
        import torch

        from stepinfluence.app.doctor import missing_modules
        from stepinfluence.machine import machine_facts, versions

        need_extra("eval", missing_modules(("scipy", "sklearn")))
        if problem == "trm" and missing_modules(("tiny_recursive_model",)):
            fail("problem: trm needs a package; pip install tiny-recursive-model")
        from stepinfluence.evaluation import evaluate
        from stepinfluence.evaluation.methods import available
        from stepinfluence.evaluation.problems import make_problem
        from stepinfluence.files import hand_out
    known = available()
    unknown = [m for m in methods or () if m not in known]
    if unknown:
        fail(f"method: got {unknown[0]!r}; use one of {', '.join(known)}")
    chosen = {name: known[name] for name in methods} if methods else known
    kept = folder or Path(f"evaluate-{problem}")
    counts = {"seeds": seeds, "subsets": subsets, "left_out": left_out, "flips": flips, "repeats": repeats}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = make_problem(problem)
        found = evaluate(
            made, chosen, seeds=seeds, subsets=subsets, left_out=left_out, flips=flips, repeats=repeats, folder=kept
        )
    finally:
        torch.set_num_threads(before)
    facts = {"settings": counts, **found.to_dict(), "machine": machine_facts(), "versions": versions()}
    text = json.dumps(facts, indent=1)
    if out is not None:
        hand_out(out, lambda made: made.write_text(text + "\n", encoding="utf-8"))
    if as_json:
        typer.echo(text)
        return
    screen.print(
        f"{problem}: {len(made.train)} training examples, {len(made.queries)} queries, {seeds} seeds, "
        f"{found.retrainings} models, kept in {shown(kept)}"
    )
    from rich.markdown import Markdown

    screen.print(Markdown(found.markdown()))
