"""The demonstration's summary on the terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepinfluence.app.demo.data import DemoResult
from stepinfluence.app.demo.report import WORDS, answer, bits, default_note, demo_checks, percent
from stepinfluence.attribution.aggregation import energy_shares
from stepinfluence.display.bars import HARMFUL, HELPFUL, bars
from stepinfluence.display.words import peak_step, signed, top_rows

TOP = 5
OTHER_COLUMNS = 48  # characters that the columns of the examples' table take, without texts and bars


def show(screen: Console, result: DemoResult, seconds_writing: float) -> None:
    """Print task, accuracy, influential examples of two queries, checks, time and memory."""
    top = result.config.training.max_digits
    screen.print()
    screen.print(
        f"[bold]Task[/bold]  Is the number of ones in a bit string odd? A block with {result.body_parameters:,} "
        f"parameters, applied once per bit, learned it from {result.n_trained:,} strings of 1 to {top} bits in "
        f"{result.optimizer_steps:,} optimizer steps."
    )
    screen.print()
    screen.print(_accuracy(result))
    longest = max(result.asked_lengths)
    heldout = next((n for n, q in enumerate(result.queries) if not q.probe and q.example.n_digits == longest), None)
    for column in dict.fromkeys([0, heldout if heldout is not None else 0]):
        screen.print()
        screen.print(_examples(result, column, screen.width))
        screen.print(Text(_rhythm(result, column)))
        screen.print(Text(_origin(result, column), style="dim"))
        owner = result.dominance(column)
        if owner is not None:
            screen.print(Text(owner.sentence, style="yellow"))
    screen.print(
        f"[dim]Influence: {default_note(result)} Positive: training on the string lowers the query's loss. Bars: its "
        f"size at each loop step, [{HELPFUL}]blue[/] where it helps, [{HARMFUL}]orange[/] where it harms. Steps count "
        "from 1.[/dim]"
    )
    screen.print()
    screen.print(_checks(result))
    screen.print()
    screen.print(_stages(result, seconds_writing))


def _accuracy(result: DemoResult) -> Table:
    table = _table(f"Accuracy on {result.config.accuracy_strings} held-out strings per length")
    groups: dict[tuple[str, bool], list[int]] = {}
    known = [(n, a, True) for n, a in result.accuracy.items()]
    known += [(n, a, False) for n, a in result.accuracy_beyond.items()]
    for n, value, inside in known:  # lengths next to one another with the same accuracy share a line
        groups.setdefault((percent(value), inside), []).append(n)
    table.add_column("bits", justify="right")
    table.add_column("right answers", justify="right")
    table.add_column("")
    for (share, inside), lengths in groups.items():
        note = "" if inside else "[dim]longer than any in training[/dim]"
        table.add_row(_ranges(lengths), share, note)
    return table


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1–3, 7``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def _examples(result: DemoResult, column: int, width: int) -> Table:
    query = result.queries[column]
    kind = "alternating probe" if query.probe else "held-out string"
    right = "right" if query.prediction == query.example.parity else "WRONG"
    title = (
        f"Query {query.example.text} [not bold]({kind} of {bits(query.example.n_digits)}): "
        f"answers {answer(query.prediction)}, {right}, loss {query.loss:.2g}[/]"
    )
    table = _table(title)
    helpful, harmful = top_rows(result.tracin[:, column], TOP)
    steps = result.sdi.shape[2]
    texts = max((len(result.train[row].text) for row in helpful + harmful), default=0)
    per_bar = -(-steps // max(8, width - OTHER_COLUMNS - texts))
    table.add_column("")
    table.add_column("training string", min_width=texts)
    table.add_column("parity")
    table.add_column("influence, %", justify="right")
    table.add_column("largest at", justify="right")
    table.add_column(f"steps 1–{steps}" + (f"\n{per_bar} per bar" if per_bar > 1 else ""))
    for what, rows in (("helpful", helpful), ("harmful", harmful)):
        for place, row in enumerate(rows):
            scores = result.sdi[row, column]
            example = result.train[row]
            table.add_row(
                Text(what if place == 0 else "", style=HELPFUL if what == "helpful" else HARMFUL),
                example.text,
                WORDS[example.parity],
                signed(float(scores.sum())),
                f"step {peak_step(scores)}",
                bars(scores, float(np.abs(result.sdi[helpful + harmful, column]).max()), each=per_bar),
            )
        if what == "helpful":
            table.add_section()
    return table


def _origin(result: DemoResult, column: int) -> str:
    """Which checkpoints a query's influence would come from in a plain sum."""
    shares = energy_shares(result.energy_by_checkpoint[:, column])
    return "Shares of the checkpoints in a plain sum by learning rate: " + ", ".join(
        f"{name} {share:.0%}" for name, share in zip(result.checkpoint_names, shares, strict=True)
    )


def _rhythm(result: DemoResult, column: int) -> str:
    """What the tests let one say of periods."""
    found = result.periods(column)
    profile = found["profile"].sentence("Influence summed over all scored strings")
    energy = found["energy"].sentence("Regardless of sign, it")
    return f"{profile}. {energy}. {found['margin'].sentence('The logit margin')}."


def _checks(result: DemoResult) -> Table:
    table = _table("Checks")
    for name in ("", "", "limit", ""):
        table.add_column(name)
    for check in demo_checks(result):
        mark = "[green]✓[/green]" if check.passed else "[bold red]✗[/bold red]"
        mark = mark if check.limit else " "
        table.add_row(f"{mark} {check.name}", f"[bold]{check.value}[/bold]", check.limit, f"[dim]{check.meaning}[/dim]")
    return table


def _stages(result: DemoResult, seconds_writing: float) -> Table:
    table = _table("Time and memory")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("CPU seconds", justify="right")
    table.add_column("peak MiB", justify="right")
    for stage in result.stages:
        peak = "–" if stage.peak_bytes is None else f"{stage.peak_bytes / 2**20:,.0f}"
        table.add_row(stage.name, f"{stage.seconds:.1f}", f"{stage.cpu_seconds:.1f}", peak)
    table.add_row("write the report", f"{seconds_writing:.1f}", "", "")
    table.add_section()
    wall, cpu = (sum(column) for column in zip(*((s.seconds, s.cpu_seconds) for s in result.stages), strict=True))
    table.add_row("total", f"{wall + seconds_writing:.1f}", f"{cpu:.1f}", "")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
