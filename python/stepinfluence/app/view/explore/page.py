"""The explorer's page: the same for the server, which it asks, and for a file that holds all answers itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepinfluence.app.view.explore import everything
from stepinfluence.app.view.explore.agreement import agreement, errors
from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.audit import DIGESTS, SPLITS, sealed_overview
from stepinfluence.app.view.explore.examples import MOST_ROWS
from stepinfluence.app.view.explore.model import exact
from stepinfluence.app.view.explore.scored import ALIKE, BY_SIZE, What
from stepinfluence.app.view.page import render
from stepinfluence.files import hand_out
from stepinfluence.progress import tqdm
from stepinfluence.search.topk import trajectories

SCRIPTS = ("source", "lists", "state", "query", "example", "everything", "explore")
"""The page's scripts, in the order in which they run; all share one scope."""

ROWS_PER_SIDE = 20
PAIRS_PER_SIDE = 5
"""Examples on either side for which the page also holds the text in full, parameters and the step by step matrix."""

LEADERS = 3
"""Examples kept on either side for each step and each checkpoint, beside the overall ones: so that a choice of steps or
of a checkpoint has rows to rank."""

SHOWN = 10
"""Rows on either side that the page shows at first, and whose agreement is told."""


def render_page(overview: dict[str, Any], answers: dict[str, Any] | None = None) -> str:
    """The page as a string; errors as for :func:`stepinfluence.app.view.page.render`.

    Args:
        overview: :meth:`Explorer.overview`.
        answers: everything else, for a page without a server; see :func:`saved_answers`. Others may ask their server.
    """
    reach = "'none'" if answers else "'self'"
    data = {"overview": overview, "answers": answers}
    values = {name: overview.get(name, {}) for name in (SPLITS, DIGESTS)}
    return render(__package__, "explore", data, scripts=SCRIPTS, reach=reach, title=overview["title"], **values)


def saved_answers(
    explorer: Explorer,
    *,
    queries: int = 50,
    rows: Sequence[int] | None = None,
    exactly: bool = False,
    by_token: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The answers that a page without a server needs, for the first queries that have features.

    For each query: its curve, the examples that lead over all steps, at each single step and at each checkpoint, and
    the full trajectories of these. Filtering in the page ranks these examples only.

    Args:
        queries: how many.
        rows: these queries instead.
        exactly: also recompute the influence of the leading examples from the model.
        by_token: also compute the influence of the tokens of the first examples, from the model.

    Raises:
        ValueError: a query has no features, or there is no such row.
        StepInfluenceError: the model must not be run, or as for :mod:`.model`.
    """
    if not 1 <= queries <= MOST_ROWS:
        raise ValueError(f"queries: got {queries}; use 1 to {MOST_ROWS}")
    side = explorer.sides["query"]
    if rows is None:
        rows = [row for row in range(min(MOST_ROWS, len(side))) if row not in side.failed][:queries]
    for row in rows:
        explorer.scored.require_query(row)
    scores = [score["key"] for score in explorer.overview()["scores"]]
    kept: dict[str, Any] = {}
    for row in tqdm(rows, desc="queries", delay=2, disable=not progress):
        by_score = {score: _by_score(explorer, row, score) for score in scores}
        if by_token:
            _add_tokens(explorer, row, by_score)
        kept[str(row)] = {
            "example": explorer.example("query", row),
            "scores": by_score,
            "exact": exact(explorer, row, k=SHOWN) if exactly else None,
        }
    together = {
        score: {w: everything.overall(explorer, score=score, weights=w) for w in (ALIKE, BY_SIZE)} for score in scores
    }
    return {
        "queries": [side.entry(row) for row in sorted(rows)],
        "of": len(explorer.query),
        "byQuery": kept,
        "overall": together,
        "reverse": _reverse(explorer, kept, together),
    }


def _by_score(explorer: Explorer, row: int, score: str) -> dict[str, Any]:
    """What is shown of a query under one score."""
    checkpoints = range(len(explorer.train.checkpoints)) if len(explorer.train.checkpoints) > 1 else range(0)
    found = explorer.top(row, k=ROWS_PER_SIDE, score=score)
    extra = [explorer.top(row, k=LEADERS, first=t, last=t, score=score) for t in range(1, explorer.query.steps + 1)]
    extra += [explorer.top(row, k=LEADERS, score=score, checkpoint=k) for k in checkpoints]
    whole, known = explorer.scores(row, score=score), {e["row"] for some in found.values() for e in some}
    for side, example in [(name, e) for more in extra for name, some in more.items() for e in some]:
        if example["row"] not in known:
            known.add(example["row"])
            sdi = whole[example["row"]][explorer.taken(row)].tolist()
            found[side].append({**example, "sdi": sdi, "score": sum(sdi)})
    examples = sorted(found["helpful"] + found["harmful"], key=lambda e: -e["score"])
    _add_parts(explorer, What(row, score), examples, checkpoints)
    return {
        "curve": explorer.curve(row, score=score),
        "curves": [explorer.curve(row, score=score, checkpoint=k) for k in checkpoints],
        "examples": examples,
        "agreement": agreement(explorer, What(row, score), k=SHOWN),
        "pairs": {
            str(e["row"]): explorer.pair(row, e["row"], score=score)
            for side in ("helpful", "harmful")
            for e in found[side][:PAIRS_PER_SIDE]
        },
    }


def _add_parts(explorer: Explorer, what: What, examples: list[dict[str, Any]], checkpoints: range) -> None:
    """Add to examples their standard errors, and their influence at each checkpoint."""
    rows = [e["row"] for e in examples]
    known = errors(explorer, what, rows)
    for e in examples:
        if e["row"] in known:
            e["error"], e["errors"] = known[e["row"]]
        e["parts"] = []
    for k in checkpoints if rows else ():
        question = explorer.scored.question(What(what.query, what.score, k))
        paths = trajectories(question, torch.tensor([rows]))[0, :, explorer.taken(what.query)]
        for e, path in zip(examples, paths.tolist(), strict=True):
            e["parts"].append(path)


def _add_tokens(explorer: Explorer, row: int, by_score: dict[str, dict[str, Any]]) -> None:
    """Add to pairs what their training example's tokens did to the query."""
    if explorer.model is None:
        raise ValueError(f"tokens: {explorer.no_model or 'there is no model to compute them with'}")
    rows = sorted({int(train) for found in by_score.values() for train in found["pairs"]})
    for score, found in by_score.items():
        by_token = explorer.model.by_token(explorer, What(row, score), rows) if rows else {}
        for train, pair in found["pairs"].items():
            pair["tokens"] = by_token[int(train)]


def _reverse(explorer: Explorer, kept: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """What the examples that the page has in full, or that lead over all queries, do to every query."""
    found: dict[str, Any] = {}
    for score, by_weights in together.items():
        rows = {int(row) for query in kept.values() for row in query["scores"][score]["pairs"]}
        lists = [some[side] for some in by_weights.values() for side in ("helpful", "harmful")]
        rows |= {e["row"] for some in lists for e in some}
        found[score] = {
            str(row): {
                "train": explorer.example("train", row),
                **everything.reverse(explorer, row, k=PAIRS_PER_SIDE, score=score),
            }
            for row in sorted(rows)
        }
    return found


def write_page(
    explorer: Explorer,
    path: Path,
    *,
    queries: int = 50,
    rows: Sequence[int] | None = None,
    exactly: bool = False,
    by_token: bool = False,
    progress: bool = True,
) -> None:
    """Write a self-contained page; arguments and errors as for :func:`saved_answers` and :func:`render_page`.

    The page names the run's stores by their digests: :func:`.audit.problems` checks it against them.
    """
    answers = saved_answers(explorer, queries=queries, rows=rows, exactly=exactly, by_token=by_token, progress=progress)
    page = render_page(sealed_overview(explorer, answers), answers)
    hand_out(path, lambda made: made.write_text(page, encoding="utf-8"))
