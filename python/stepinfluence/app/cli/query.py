"""``sdi query``: which training examples shaped an answer, and at which loop step."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepinfluence.app.cli._common import (
    TRUST_HELP,
    DampingOption,
    console,
    damping_of,
    fail,
    print_json,
    require_run,
    require_trust,
)

if TYPE_CHECKING:
    from stepinfluence.app.runs.query import Answer, Asked
    from stepinfluence.app.runs.stored import StoredRun
    from stepinfluence.attribution.features import Features
    from stepinfluence.store import Store

HELP = """Ask a run: which training examples helped (or harmed) an answer most, and at which loop step.

Positive influence: training on the example lowers the query's loss. Steps count from 1.

[bold]Examples[/bold]
  [cyan]sdi query run --row 0[/cyan]                         the first query of the run
  [cyan]sdi query run --id "anna is from" -k 5[/cyan]        a query by its id
  [cyan]sdi query run --id q17 --step 17-32[/cyan]           who matters in the late steps?
  [cyan]sdi query run --id q17 --harmful[/cyan]              who raised the loss?
  [cyan]sdi query run --id q17 --exact[/cyan]                a short list, without sketches
  [cyan]sdi query run --id q17 --exact --curvature fisher[/cyan]   all rows, at most 4,096
  [cyan]sdi query run --id q17 --curvature none[/cyan]       SDI alone, as the paper has it
  [cyan]sdi query run --id q17 --damping training[/cyan]     or say why that is not known
  [cyan]sdi query run --id q17 --curvature source[/cyan]     through training's checkpoints
  [cyan]sdi query run --input new.jsonl[/cyan]               examples that are in no store
  [cyan]sdi query run --row 0 --json | jq .[0].hits[0][/cyan]
""".replace("[0]", r"\[0]")
EPILOG = "Exit status: 0 answered, 2 wrong use or input (no such id, damaged store), 130 interrupted."


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that sdi featurize wrote.")],
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Id of a query; repeatable.")] = None,
    rows: Annotated[
        list[int] | None, typer.Option("--row", metavar="N", help="Row of a query, counted from 0; repeatable.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="FILE", help="New examples: .json or .jsonl, - for JSON lines on stdin."),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="How many training examples.")] = 10,
    step: Annotated[
        str | None, typer.Option(metavar="N[-M]", help="Rank by the influence at these steps of the query.")
    ] = None,
    harmful: Annotated[bool, typer.Option("--harmful", help="Those that raise the loss most.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Recompute a short list's SDI from the model.")] = False,
    candidates: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Length of that short list. \\[default: 4 k]")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Influence through these body parameters only: '*.mlp.*'.")
    ] = None,
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Only scores corrected for curvature, fisher or block (by parameter); source: followed through "
            "training, from checkpoints along it; or none: only SDI. \\[default: the run's setting first, then SDI]",
        ),
    ] = None,
    damping: DampingOption = None,
    train: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the training examples.")] = "train",
    query: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the queries. \\[default: the other one]")] = "",
    device: Annotated[str | None, typer.Option(help="For --input and --exact. \\[default: the run's]")] = None,
    trust_project: Annotated[bool, typer.Option("--trust-project", help=TRUST_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """See :data:`HELP`."""
    _check(ids or rows, file, exact, candidates, curvature, damping)
    if query and file is not None:
        fail("query: is the split of --id and --row; --input has the queries")
    if device is not None and not exact and file is None:
        fail("device: is where the model runs, for --input and --exact; without them, it does not")
    require_run(folder)
    number = damping_of(damping)
    screen = console(json_output=True)
    with screen.status("reading"):
        from stepinfluence.app.runs.curvatures import scores_to_show
        from stepinfluence.app.runs.query import answer, ask_rows
        from stepinfluence.app.runs.stored import StoredRun

        opened = StoredRun.open(folder, device=device)
    if file is not None or exact:
        require_trust(folder, opened.config.project, trusted=trust_project)
    with screen.status("reading"):
        store = opened.store(train)
        if file is not None:
            asked = _new(opened, store, file)
        else:
            source = opened.store(query or opened.other(train))
            asked = ask_rows(opened, source, [*(source.find(i) for i in ids or ()), *(rows or ())])
        ranked = _steps(step, asked.features[0])
        scores, why = scores_to_show(opened.path, store, curvature or ("none" if exact else None), number)
    how: dict[str, Any] = {
        "steps": ranked,
        "harmful": harmful,
        "exact": exact,
        "candidates": candidates,
        "parameters": parameters,
    }
    terminal = sys.stderr.isatty()
    found = [answer(opened, store, asked, k, curvature=score, progress=terminal, **how) for score in scores]
    together = list(zip(*found, strict=True))
    if as_json:
        lines = [_json(one) | {"also": [_json(other) for other in rest]} for one, *rest in together]
        print_json(lines)
        return
    from stepinfluence.app.cli._answers import show

    show(console(), together, harmful=harmful, step=step, exact=exact, why=why)


def _check(
    asked: list[str] | list[int] | None,
    file: str | None,
    exact: bool,
    candidates: int | None,
    curvature: str | None,
    damping: str | None,
) -> None:
    """Leave if options say nothing together."""
    if sum(given is not None for given in (asked, file)) != 1:
        fail("query: say what to ask about: --id ID, --row N (both repeatable), or --input FILE with new examples")
    if candidates is not None and (not exact or curvature == "fisher"):
        fail("candidates: is the length of --exact's short list; with --curvature fisher it takes all rows")
    if damping is not None and (curvature == "none" or (exact and curvature is None)):
        fail("damping: goes with scores that are corrected for curvature: --curvature fisher or block")


def _new(opened: StoredRun, train: Store, file: str) -> Asked:
    """Queries that are in a file of new examples."""
    from stepinfluence.app.runs.query import ask_new

    new = [opened.prepared.project.from_json(fields) for fields in _examples(file)]
    opened.require_unchanged(train)
    return ask_new(opened, new)


def _steps(text: str | None, queries: Features) -> range | None:
    """``"17-32"`` as the 0-based range of these 1-based steps."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        fail(f"step: got {text!r}; give a step (17) or a range (17-32), counted from 1")
    count = queries.values.shape[1] if queries.per_step else 1
    if last > count:
        fail(f"step: got {text!r}; the queries have steps 1 to {count}")
    return range(first - 1, last)


def _examples(name: str) -> list[Any]:
    """What a JSON or JSON lines file holds, one value per example."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
        if name.endswith(".json"):
            content = json.loads(text)
            found = content if isinstance(content, list) else [content]
        else:
            # Other characters that end lines may stand in a text as they are.
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        fail(f"input: {name} could not be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        fail(f"input: {name} is not JSON ({error}); one example per line, or a list in a .json file")
    if not found:
        fail(f"input: {name} holds no example")
    return found


def _json(one: Answer) -> dict[str, Any]:
    errors = one.agreement.errors
    return {
        "query": {
            "id": one.id,
            "text": one.text,
            "loss": one.loss,
            "answer": one.answered.answer,
            "truth": one.answered.truth,
        },
        "score": one.score,
        "unit": one.unit,
        "checkpoints": [
            {"name": name, "share": share} for name, share in zip(one.checkpoints, one.shares, strict=True)
        ],
        "dominated_by": None if one.dominance is None else one.dominance.name,
        "agreement": {
            "standard_error": one.agreement.noise,
            "lead_by_halves": one.agreement.halves,
            "lead_exactly": one.agreement.exact,
            "unknown": one.agreement.unknown or None,
        },
        "hits": [
            {
                "row": hit.row,
                "id": hit.id,
                "text": hit.text,
                "score": hit.score,
                "total": hit.total,
                "peak_step": hit.peak_step,
                "trajectory": [float(value) for value in hit.trajectory],
                **({"estimate": hit.estimate} if hit.estimate is not None else {}),
                **({"standard_error": errors[place]} if errors else {}),
            }
            for place, hit in enumerate(one.hits)
        ],
    }
