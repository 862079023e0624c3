"""``sdi query``'s answers on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from stepinfluence.display.bars import HARMFUL, HELPFUL, bars, printable

if TYPE_CHECKING:
    from rich.console import Console

    from stepinfluence.app.runs.query import Answer

OTHER_COLUMNS = 44  # characters that the columns without texts and bars take


def show(
    screen: Console,
    answers: Sequence[Sequence[Answer]],
    *,
    harmful: bool,
    step: str | None,
    exact: bool,
    why: str = "",
) -> None:
    """Print what the leading training examples of some queries are.

    Args:
        answers: for each query its answers by different scores, the one to look at first in front.
        harmful: whether those that harm most were asked for.
        step: the steps that were ranked by, as they were given.
        exact: whether scores were recomputed without sketches.
        why: why scores are not corrected for curvature, where they were to be.
    """
    for together in answers:
        _show(screen, together, harmful=harmful, step=step, exact=exact)
    if why:
        screen.print(f"Not corrected for curvature: {why}", style="dim", markup=False)


def _show(screen: Console, together: Sequence[Answer], *, harmful: bool, step: str | None, exact: bool) -> None:
    first = together[0]
    title = Text.assemble(("Query ", "bold"), (str(printable(first.id)), "bold"))
    if first.text is not None and first.text != str(first.id):
        title.append(": ").append(printable(first.text, 300))
    title.append(f"  loss {first.loss:.3g}", style="dim")
    screen.print()
    screen.print(title)
    if (said := _said(first)) is not None:
        screen.print(said)
    for one in together:
        if len(together) > 1:
            screen.print()
        screen.print(Text(f"Score: {one.score}", style="dim"))
        _list(screen, one, step)
        if (trust := _trust(one)) is not None:
            screen.print(Text(trust, style="dim"))
        if one.dominance is not None:
            screen.print(Text(printable(one.dominance.sentence).plain, style="yellow"))
    if len(together) > 1 and first.hits:
        rows = [{hit.row for hit in one.hits} for one in together]
        screen.print(f"[dim]{len(set.intersection(*rows))} of the {len(first.hits)} are in both lists.[/dim]")
    how = "exact, recomputed from the model" if exact else "estimated from sketches"
    note = f"Training on these {'raises' if harmful else 'lowers'} the query's loss most; {how}; {first.unit}. "
    if first.hits and len(first.hits[0].trajectory) > 1:
        note += f"Bars: [{HELPFUL}]helps[/], [{HARMFUL}]harms[/]."
    else:
        note += "No trajectory: the query took one step, or is summed over steps."
    screen.print(f"[dim]{note}[/dim]")


def _said(one: Answer) -> Text | None:
    """The model's answer beside the truth."""
    answer, truth, right = one.answered.answer, one.answered.truth, one.answered.right
    if answer is None and truth is None:
        return None
    said = Text()
    if answer is not None:
        said.append("The model answers ").append(printable(answer, 200))
    if truth is not None:
        said.append("; the truth is " if answer is not None else "The truth is ").append(printable(truth, 200))
    if right is not None:
        said.append("  ✓ right" if right else "  ✗ wrong", style="green" if right else "red")
    return said


def _trust(one: Answer) -> str | None:
    """How far the ranking can be trusted, in a sentence."""
    told, count = one.agreement, len(one.hits)
    if not count:
        return None
    if told.exact is not None:
        return f"{told.exact} of these {count} are also the first {count} by the sketches."
    parts = []
    if told.noise is not None:
        how = "at most" if told.errors else "as two halves of the columns tell it"
        parts.append(f"Sketch noise: a score is off by ± {told.noise:.2g} (standard error, {how}).")
    if told.halves is not None:
        parts.append(f"{told.halves[0]} and {told.halves[1]} of the {count} lead by either half of the columns, too.")
    if told.unknown:
        parts.append(f"Not known: {told.unknown}.")
    return " ".join(parts) or None


def _list(screen: Console, one: Answer, step: str | None) -> None:
    if not one.hits:
        screen.print("no training example")
        return
    trajectories = np.stack([hit.trajectory for hit in one.hits])
    steps = trajectories.shape[1]
    texts = any(hit.text is not None for hit in one.hits)
    room = max(8, (screen.width - OTHER_COLUMNS) // (2 if texts else 1))
    each = -(-steps // room)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("id", no_wrap=True, overflow="ellipsis", max_width=24)
    if texts:
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    if step is not None:
        table.add_column(f"steps {step}", justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    if steps > 1:
        table.add_column("peak", justify="right", no_wrap=True)
        table.add_column(f"steps 1–{steps}" + (f", {each} per bar" if each > 1 else ""), no_wrap=True)
    most = float(np.nanmax(np.abs(trajectories)))
    for place, hit in enumerate(one.hits, 1):
        cells: list[Text | str] = [str(place), printable(hit.id)]
        cells += [printable(hit.text or "")] if texts else []
        cells += [f"{hit.score:+.3g}"] if step is not None else []
        cells += [f"{hit.total:+.3g}"]
        cells += [f"step {hit.peak_step}", bars(hit.trajectory, most, each=each)] if steps > 1 else []
        table.add_row(*cells)
    screen.print(table)
