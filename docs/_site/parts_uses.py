"""The figures of docs/uses.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kept import Parts, load, source, table
from stepinfluence.evaluation import Estimate, over_seeds

Run = dict[str, Any]


def _kept(use: str) -> tuple[list[Run], str]:
    result = load(f"uses-{use}.json")
    runs: list[Run] = result["runs"]
    return runs, f"{len(runs)} seeds; means with 95 % intervals over them. {source(f'uses-{use}.json', False, result)}"


def _over(runs: Sequence[Run], value: Callable[[Run], float], *, share: bool = True) -> str:
    """Mean and interval; of shares cut at 0 and 1."""
    found = over_seeds([value(run) for run in runs])
    return str(Estimate(found.value, max(0.0, found.low), min(1.0, found.high)) if share else found)


def mislabelled() -> str:
    runs, note = _kept("mislabelled")
    problems = list(runs[0])
    rows = []
    for name in runs[0][problems[0]]:
        cells = []
        for p in problems:
            more = _over(runs, lambda run, p=p, n=name: run[p][n]["AUC"] - run[p]["loss"]["AUC"], share=False)
            cells += [_over(runs, lambda run, p=p, n=name, k=k: run[p][n][k]) for k in ("found", "AUC")]
            cells += ["–" if name == "loss" else more]
        rows.append([name, *cells])
    head = ["score", *(f"{p}: {what}" for p in problems for what in ("found", "AUC", "AUC beyond the loss's"))]
    return f"{table(head, rows)}\n\n{note}"


def curation() -> str:
    runs, note = _kept("curation")
    columns = ("accuracy", "loss", "of the kind", "wrong")
    rows = []
    for name, first in runs[0].items():
        cells = [
            _over(runs, lambda run, n=name, k=k: run[n][k], share=k != "loss") if k in first else "–" for k in columns
        ]
        changes = "–"
        if name not in ("before", "random"):
            changes = _over(runs, lambda run, n=name: run[n]["accuracy"] - run["random"]["accuracy"], share=False)
        rows.append([name, cells[0], changes, *cells[1:]])
    head = ["chosen by", "accuracy", "more than random", "loss", "of the target's kind", "wrong labels"]
    return f"{table(head, rows)}\n\n{note}"


def horizon() -> str:
    runs, note = _kept("horizon")
    rows = []
    for name in runs[0]:
        trained = int(name.rsplit(" ", 1)[1])
        horizons = sorted({run[name]["horizon"] for run in runs})
        best = [
            max(range(1, len(run[name]["accuracy"]) + 1), key=lambda k, r=run: r[name]["accuracy"][k - 1])
            for run in runs
        ]
        rows.append([
            name, " to ".join(str(h) for h in dict.fromkeys((horizons[0], horizons[-1]))),
            _over(runs, lambda run, n=name: run[n]["share"][0]),
            _over(runs, lambda run, n=name, t=trained: run[n]["accuracy"][t - 1]),
            _over(runs, lambda run, n=name: run[n]["accuracy"][run[n]["horizon"] - 1]),
            f"{min(best)} to {max(best)}",
        ])  # fmt: skip
    head = [
        "model",
        "horizon",
        "share of the first step",
        "accuracy as trained",
        "accuracy at the horizon",
        "fewest loops with the best accuracy",
    ]
    return f"{table(head, rows)}\n\n{note}"


def cancellation() -> str:
    runs, note = _kept("cancellation")
    columns = ("median", "over half", "over 90 %", "confirmed")
    rows = []
    for problem in runs[0]:
        known = {k: [run for run in runs if run[problem][k] is not None] for k in columns}
        cells = [_over(of, lambda run, p=problem, k=k: run[p][k]) if len(of) > 1 else "–" for k, of in known.items()]
        rows.append([problem, *cells])
    head = [
        "problem",
        "cancelled, median",
        "pairs over a half",
        "pairs over 90 %",
        "of those over a half, exact agrees",
    ]
    return f"{table(head, rows)}\n\n{note}"


PARTS: Parts = {
    "uses-mislabelled": mislabelled,
    "uses-curation": curation,
    "uses-horizon": horizon,
    "uses-cancellation": cancellation,
}
