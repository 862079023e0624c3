"""``sdi outliers``: training examples that stand out, by self-influence or leverage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepinfluence.app.cli._common import console, damping_of, fail, print_json, require_run

if TYPE_CHECKING:
    from stepinfluence.attribution.curvature import Damping
    from stepinfluence.search import Outlier

HELP = """Mislabelled or unusual training examples of a run, by their own loop steps.

[cyan]self-influence[/cyan], the squared gradient, is large for examples that training keeps pulling at: wrong labels \
and hard cases. [cyan]leverage[/cyan], the same under the curvature of all training rows, is large for examples that \
no others explain: rare ones.

[bold]Examples[/bold]
  [cyan]sdi outliers run[/cyan]                       look here first for wrong labels
  [cyan]sdi outliers run --by leverage -k 50[/cyan]
  [cyan]sdi outliers run --json | jq .[0][/cyan]
""".replace("[0]", r"\[0]")
EPILOG = "Exit status: 0 done, 2 wrong use or input (damaged or incomplete store), 130 interrupted."


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that sdi featurize wrote.")],
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="How many training examples.")] = 20,
    by: Annotated[str, typer.Option(metavar="SCORE", help="self-influence or leverage.")] = "self-influence",
    curvature: Annotated[
        str | None, typer.Option(metavar="KIND", help="Of the leverage: fisher or block. \\[default: fisher]")
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            help="Of the leverage: auto, training (1 / training's length), or relative to the largest eigenvalue. "
            "\\[default: auto]",
        ),
    ] = None,
    train: Annotated[str, typer.Option(metavar="SPLIT", help="Split of the training examples.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """See :data:`HELP`."""
    if by not in ("self-influence", "leverage"):
        fail(f"by: got {by!r}; use self-influence or leverage")
    if by != "leverage" and not (damping is None and curvature is None):
        fail(f"{'curvature' if damping is None else 'damping'}: goes with --by leverage")
    curvature = curvature or "fisher"
    if curvature not in ("fisher", "block"):
        fail(f"curvature: got {curvature!r}; leverage needs fisher or block")
    number: Damping = "auto" if damping is None else damping_of(damping)
    require_run(folder)
    with console(json_output=True).status("reading"):
        from stepinfluence.app.runs.curvatures import damping_named, kept_curvatures
        from stepinfluence.app.runs.stored import StoredRun
        from stepinfluence.search import outliers

        opened = StoredRun.open(folder)
        store = opened.store(train)
        if by == "leverage":
            fitted = kept_curvatures(opened.path, store, curvature, number)
            assert isinstance(fitted, list)
            found = outliers(store, k, by="leverage", curvature=fitted)
            shown = f"leverage under curvature {curvature}, {damping_named(fitted)}"
        else:
            found = outliers(store, k)
            shown = "self-influence"
    if as_json:
        print_json([_json(one, by) for one in found])
        return
    _show(found, shown, per_step=store.per_step)


def _json(one: Outlier, by: str) -> dict[str, object]:
    return {
        "row": one.row,
        "id": one.id,
        "text": one.text,
        "by": by,
        "score": one.score,
        "loss": one.loss,
        "steps": one.steps.tolist(),
    }


def _show(found: list[Outlier], shown: str, *, per_step: bool) -> None:
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    from stepinfluence.display.bars import bars, printable

    screen = console()
    if not found:
        screen.print("no training example")
        return
    steps = max(len(one.steps) for one in found)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("id", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    each = -(-steps // 24)
    if steps > 1:
        table.add_column(f"steps 1–{steps}" + (f", {each} per bar" if each > 1 else ""), no_wrap=True)
    most = float(np.nanmax(np.abs(np.concatenate([one.steps for one in found]))))
    for place, one in enumerate(found, 1):
        cells: list[Text | str] = [str(place), printable(one.id), printable(one.text or "")]
        cells += [f"{one.loss:.3g}", f"{one.score:.3g}"]
        cells += [bars(one.steps.astype(np.float32), most, each=each)] if steps > 1 else []
        table.add_row(*cells)
    screen.print(table)
    note = "" if per_step else " The rows are summed over steps: featurize with --per-step for scores by step."
    screen.print(Text(f"Score: {shown}.{note}", style="dim"))
