"""Figures of docs/evaluation.md and docs/curvature.md that are about all problems, from what bench.evaluate keeps."""

from __future__ import annotations

from typing import Any

from kept import Parts, load, table
from stepinfluence.evaluation import Evaluation, Figure
from stepinfluence.evaluation.result import Merits

PROBLEMS = ("adder", "majority", "language", "parity", "trm")
FISHER, SDI, TRAK, EK_FAC, SMALLEST = "SDI-Fisher, auto", "SDI, m=2048", "TRAK", "EK-FAC", "SDI-Fisher, auto, m=32"
AGAINST = (SDI, "SDI, cosine", TRAK, "TRAK, 5 models", EK_FAC)
KINDS = {"fisher": FISHER, "block": "SDI-Fisher blocks, auto"}
MISSING = "–"


def kept() -> dict[str, dict[str, Any]]:
    """The results of all problems.

    Raises:
        NotKeptError: one is missing.
    """
    return {problem: load(f"evaluate-{problem}.json") for problem in PROBLEMS}


def evaluations() -> dict[str, Evaluation]:
    """The same, read."""
    return {problem: Evaluation.from_dict(result) for problem, result in kept().items()}


def merits(found: Evaluation) -> dict[str, Merits]:
    """By method."""
    return {m.method: m for m in found.merits}


def difference(found: Evaluation, method: str, other: str) -> str:
    """Of the LDS, seed by seed; a dash where one of the two could not be run."""
    known = merits(found)
    return str(found.difference("lds", method, other)) if {method, other} <= set(known) else MISSING


def summary() -> str:
    """LDS of every method on every problem, differences that are asked about, and what scoring costs."""
    found = evaluations()
    by_name = {problem: merits(one) for problem, one in found.items()}
    names = list(dict.fromkeys(name for one in by_name.values() for name in one))
    head = ["", *PROBLEMS]

    def row(name: str, what: str) -> list[str]:
        known = [by_name[problem].get(name) for problem in PROBLEMS]
        if what == "cost":
            return [name, *(MISSING if m is None else f"{m.seconds:.2f} s, {m.bytes_per_example} B" for m in known)]
        return [name, *(MISSING if m is None else str(m.figure(what)) for m in known)]

    smooth = [one.smoothness for one in found.values()]
    agree = [one.truth.half_agreement if one.truth else None for one in found.values()]
    rows = [row(name, "lds") for name in names]
    rows += [
        ["*metasmoothness, across step sizes*", *(MISSING if s is None else str(s.across_steps) for s in smooth)],
        ["*metasmoothness, at nearby weights*", *(MISSING if s is None else str(s.nearby) for s in smooth)],
        ["*two initialisations' agreement on halves*", *(MISSING if a is None else str(a) for a in agree)],
    ]
    less = [[f"minus {other}", *(difference(one, FISHER, other) for one in found.values())] for other in AGAINST]
    less.append([f"{SMALLEST}, minus {TRAK}", *(difference(one, SMALLEST, TRAK) for one in found.values())])
    return "\n\n".join([
        "LDS; means and 95 % intervals over five seeds:", table(["method", *PROBLEMS], rows),
        f"LDS of `{FISHER}` (m = 2048), seed by seed, less that of others:", table(head, less),
        "Processor time of scoring, and bytes that are kept of a training example:",
        table(["method", *PROBLEMS], [row(name, "cost") for name in names if name != "random"]),
    ])  # fmt: skip


def best_damping(result: dict[str, Any], kind: str) -> tuple[str, list[float]]:
    """The damping with the highest mean LDS of a kind of matrix, and its LDS by seed."""
    grid = {name.split(", ")[1]: v for name, v in result["dampings"].items() if name.startswith(f"{kind},")}
    best = max(grid, key=lambda damping: sum(grid[damping]))
    return best, grid[best]


def lost(problem: str, result: dict[str, Any], kind: str) -> Figure:
    """LDS of the chosen damping less that of the best of the grid, over seeds."""
    auto = merits(Evaluation.from_dict(result))[KINDS[kind]].lds.by_seed
    return Figure.of([a - b for a, b in zip(auto, best_damping(result, kind)[1], strict=True)])


def dampings() -> str:
    """LDS by damping, and what choosing it without retraining loses."""
    results = kept()
    texts = ["LDS by damping, means over five seeds; in the last rows the 95 % interval of the difference:"]
    rows = []
    for kind, method in KINDS.items():
        title = "Fisher" if kind == "fisher" else "blocks"
        auto = [merits(Evaluation.from_dict(result))[method].lds.value for result in results.values()]
        rows.append([f"{title}, auto", *(f"{value:.3f}" for value in auto)])
        for name in [n for n in results[PROBLEMS[0]]["dampings"] if n.startswith(f"{kind},")]:
            values = [result["dampings"][name] for result in results.values()]
            label = f"{title}, {name.split(', ')[1]}"
            rows.append([label, *(f"{sum(one) / len(one):.3f}" for one in values)])
        rows.append([
            f"*{title}: auto less the best*",
            *(f"{_three(lost(p, r, kind))} ({best_damping(r, kind)[0]})" for p, r in results.items()),
        ])  # fmt: skip
    return "\n\n".join([*texts, table(["damping", *PROBLEMS], rows)])


def _three(figure: Figure) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


PARTS: Parts = {"evaluation-summary": summary, "curvature": dampings}
