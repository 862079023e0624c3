"""The explorer's page: the same for the server, which it asks, and for a file that holds all answers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stepinfluence.app.view.explore.answers import MOST_ROWS, Explorer
from stepinfluence.app.view.page import render

ROWS_PER_SIDE = 20
PAIRS_PER_SIDE = 5
"""Examples on either side for which the page also holds the text in full, parameters and the step by step matrix."""

PER_STEP = 3
"""Examples kept on either side for each step, beside the overall ones: so that the filter by steps has rows to rank."""


def render_page(overview: dict[str, Any], answers: dict[str, Any] | None = None) -> str:
    """The page as a string; errors as for :func:`stepinfluence.app.view.page.render`.

    Args:
        overview: :meth:`Explorer.overview`.
        answers: everything else, for a page without a server; see :func:`saved_answers`. Others may ask their server.
    """
    reach = "'none'" if answers else "'self'"
    data = {"overview": overview, "answers": answers}
    return render(__package__, "explore", data, reach=reach, title=overview["title"])


def saved_answers(explorer: Explorer, *, queries: int = 50, progress: bool = True) -> dict[str, Any]:
    """The answers that a page without a server needs, for the first queries that have features.

    For each query: its curve, the examples that lead over all steps and at each single step, and the full trajectories
    of these. Filtering by steps in the page ranks these examples only.
    """
    if not 1 <= queries <= MOST_ROWS:
        raise ValueError(f"queries: got {queries}; use 1 to {MOST_ROWS}")
    rows = [row for row in range(min(MOST_ROWS, len(explorer.query))) if row not in explorer.query.failed][:queries]
    scores = [score["key"] for score in explorer.overview()["scores"]]
    kept = {
        str(row): {
            "example": explorer.example("query", row),
            "scores": {score: _by_score(explorer, row, score) for score in scores},
        }
        for row in tqdm(rows, desc="queries", delay=2, disable=not progress)
    }
    wanted = set(rows)
    items = [e for e in explorer.queries(limit=MOST_ROWS)["items"] if e["row"] in wanted]
    return {"queries": items, "of": len(explorer.query), "byQuery": kept}


def _by_score(explorer: Explorer, row: int, score: str) -> dict[str, Any]:
    """What is shown of a query under one score."""
    found = explorer.top(row, k=ROWS_PER_SIDE, score=score)
    for step in range(1, explorer.query.steps + 1):
        extra = explorer.top(row, k=PER_STEP, first=step, last=step, score=score)
        for side in ("helpful", "harmful"):
            for example in extra[side]:
                if all(example["row"] != e["row"] for s in found.values() for e in s):
                    found[side].append({**example, "score": sum(example["sdi"])})
    return {
        "curve": explorer.curve(row, score=score),
        "examples": sorted(found["helpful"] + found["harmful"], key=lambda e: -e["score"]),
        "pairs": {
            str(e["row"]): explorer.pair(row, e["row"], score=score)
            for side in ("helpful", "harmful")
            for e in found[side][:PAIRS_PER_SIDE]
        },
    }


def write_page(explorer: Explorer, path: Path, *, queries: int = 50, progress: bool = True) -> None:
    """Write a self-contained page; errors as for :func:`render_page`."""
    text = render_page(explorer.overview(), saved_answers(explorer, queries=queries, progress=progress))
    path.write_text(text, encoding="utf-8")
