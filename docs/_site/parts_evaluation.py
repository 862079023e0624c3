"""Figures of docs/evaluation.md and docs/curvature.md that are about all problems, from what bench.evaluate keeps."""

from __future__ import annotations

from typing import Any

from kept import RESULTS, NotKeptError, Parts, folded, load, source, table
from stepinfluence.evaluation import Evaluation, Figure
from stepinfluence.evaluation.result import Merits

PROBLEMS = ("adder", "majority", "language", "parity", "trm")
FISHER, LENGTH, SDI, TRAK, SMALLEST = (
    "SDI-Fisher, auto", "SDI-Fisher, training", "SDI, m=2048", "TRAK", "SDI-Fisher, auto, m=32",
)  # fmt: skip
PEERS = (SDI, "SDI, cosine", TRAK, "TRAK, 5 models", "EK-FAC")
ALONG = ("SDI-Fisher, auto, 5 checkpoints", "SDI-Fisher, training, 5 checkpoints", "SOURCE of a run")
AGAINST = {FISHER: PEERS, LENGTH: (FISHER, *PEERS, *ALONG)}
"""What a method's LDS is held against."""
MISSING = "–"


def kept(kind: str) -> dict[str, dict[str, Any]]:
    """The results of a kind, of the problems that have one.

    Raises:
        NotKeptError: none has.
    """
    known = [problem for problem in PROBLEMS if (RESULTS / f"{kind}-{problem}.json").is_file()]
    if not known:
        raise NotKeptError(kind)
    return {problem: load(f"{kind}-{problem}.json") for problem in known}


def evaluations() -> dict[str, Evaluation]:
    """The same, read."""
    return {problem: Evaluation.from_dict(result) for problem, result in kept("evaluate").items()}


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
    head = ["", *found]

    def row(name: str, what: str) -> list[str]:
        known = [by_name[problem].get(name) for problem in found]
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
    less = {
        method: [[f"minus {other}", *(difference(one, method, other) for one in found.values())] for other in others]
        for method, others in AGAINST.items()
    }
    less[FISHER].append([f"{SMALLEST}, minus {TRAK}", *(difference(one, SMALLEST, TRAK) for one in found.values())])
    texts = ["LDS; means and 95 % intervals over five seeds:", table(["method", *found], rows)]
    for method, lines in less.items():
        texts.append(folded(f"LDS of {method} (m = 2048), seed by seed, less that of others", table(head, lines)))
    texts += [
        folded(
            "Brittleness: answers that turn without the most helpful fifth, and how much their loss rises (nats)",
            table(["method", *found], [_removed(name, by_name) for name in names]),
        ),
        folded(
            "Processor time of scoring, and bytes that are kept of a training example",
            table(["method", *found], [row(name, "cost") for name in names if name != "random"]),
        ),
    ]
    return "\n\n".join(texts)


def _removed(name: str, by_name: dict[str, dict[str, Merits]]) -> list[str]:
    """A row: of each problem, what leaving out the most helpful examples does."""
    cells = []
    for known in by_name.values():
        m = known.get(name)
        turned, rise = (None, None) if m is None else (m.brittleness, m.rise)
        share = "" if turned is None else f"{turned.value:.2f} turn, "
        cells.append(MISSING if rise is None else f"{share}{rise}")
    return [name, *cells]


def best_damping(lds: dict[str, list[float]], kind: str) -> str:
    """The damping of the grid with the highest mean LDS of a kind of matrix."""
    grid = {name: values for name, values in lds.items() if name.startswith(f"{kind}, ") and name[-1].isdigit()}
    return max(grid, key=lambda name: sum(grid[name]))


def less(lds: dict[str, list[float]], name: str, other: str) -> Figure:
    """Difference in LDS, over seeds."""
    return Figure.of([a - b for a, b in zip(lds[name], lds[other], strict=True)])


def dampings() -> str:
    """LDS by damping, and what choosing it without retraining loses."""
    found = {problem: result["lds"] for problem, result in kept("dampings").items()}
    names = list(dict.fromkeys(name for lds in found.values() for name in lds))

    def mean(lds: dict[str, list[float]], name: str) -> str:
        return f"{sum(lds[name]) / len(lds[name]):.3f}" if name in lds else MISSING

    def lost(lds: dict[str, list[float]], name: str) -> str:
        best = best_damping(lds, name.split(", ")[0])
        return f"{_three(less(lds, name, best))} ({best.split(', ')[1]})" if name in lds else MISSING

    rows = [[f"`{name}`", *(mean(lds, name) for lds in found.values())] for name in names]
    chosen = ("fisher, auto", "fisher, training time", "fisher, training", "block, auto")
    less_best = [[f"`{name}`", *(lost(lds, name) for lds in found.values())] for name in chosen if name in names]
    caption = "Curves: a damping for all, relative to the largest eigenvalue. Lines: what nobody chooses."
    return "\n\n".join(
        [
            "![LDS by damping on five problems](images/curvature-dampings.png)",
            f"*LDS by damping, means over five seeds. {caption}*",
            "LDS of what nobody chooses, less the best of its grid (in brackets: which), with the 95 % interval:",
            table(["damping", *found], less_best),
            folded("LDS of every damping", table(["damping", *found], rows)),
            folded("Where these figures come from", *_sources("dampings")),
        ]
    )


def _sources(kind: str) -> list[str]:
    """A sentence on each kept result of a kind."""
    return [source(f"{kind}-{problem}.json", False, result) for problem, result in kept(kind).items()]


def _three(figure: Figure) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


PARTS: Parts = {"evaluation-summary": summary, "curvature": dampings}
