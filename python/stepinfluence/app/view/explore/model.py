"""Answers that need the model itself: exact influence, and influence by token. They run the run's project."""

from __future__ import annotations

import threading
from typing import Any

import torch

from stepinfluence.app.runs.by_token import TokenInfluence, influence_by_token
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.examples import TOKENS_SHOWN
from stepinfluence.app.view.explore.scored import What
from stepinfluence.display.words import visible
from stepinfluence.errors import StoreError
from stepinfluence.search import exact_rows

CANDIDATES, MOST_CANDIDATES = 4, 200
"""Rows on either side that are recomputed for each row that is shown, and altogether unless more are shown."""


class RunModel:
    """The model of a run, one question at a time."""

    def __init__(self, run: StoredRun) -> None:
        self._run = run
        self._lock = threading.Lock()

    def exact(self, explorer: Explorer, what: What, rows: list[int]) -> dict[int, list[float]]:
        """Exact influence of some training rows on one query, by step, without sketches.

        Raises:
            StepInfluenceError, ValueError: as for :func:`stepinfluence.search.exact_rows`.
        """
        assert what.query is not None
        question = explorer.scored.question(what)
        with self._lock:
            query = self._run.examples(explorer.query, [what.query])
            recompute = self._run.recompute(explorer.train, query)
            found = exact_rows(question, torch.tensor([sorted(rows)]), exact=recompute, progress=False)
        return {row: found[0, k].tolist() for k, row in enumerate(sorted(rows))}

    def by_token(self, explorer: Explorer, what: What, rows: list[int]) -> list[TokenInfluence]:
        """Influence of the tokens of some training examples on one query.

        Raises:
            StepInfluenceError, ValueError: as for :func:`.influence_by_token`.
        """
        assert what.query is not None
        explorer.scored.require_query(what.query)
        with self._lock:
            return influence_by_token(
                self._run,
                explorer.train,
                rows,
                [explorer.query.features(k, [what.query]) for k in range(len(explorer.query.checkpoints))],
                etas=explorer.scored.etas(what.checkpoint),
                parameters=what.parameters or None,
                curvature=explorer.scored.choice(what.score),
            )


def exact(
    explorer: Explorer,
    row: int,
    *,
    k: int = 10,
    first: int = 1,
    last: int | None = None,
    parameters: str = "",
    checkpoint: int | None = None,
) -> dict[str, Any]:
    """Exact influence of the rows that lead by SDI, and how many of them still lead.

    Recomputed are the k rows that are shown on either side, and further candidates that the sketches rank behind them.

    Raises:
        StepInfluenceError, ValueError: as for :meth:`RunModel.exact`, or the model must not be run.
    """
    model, what = _model(explorer), What(row, "sdi", checkpoint, parameters)
    steps = explorer.steps(first, last)
    wider = max(k, min(CANDIDATES * k, MOST_CANDIDATES))
    shown = explorer.leading_rows(what, k=k, first=first, last=last)
    candidates = explorer.leading_rows(what, k=wider, first=first, last=last)
    rows = {r for some in candidates.values() for r in some}

    def make() -> dict[str, Any]:
        sdi = model.exact(explorer, what, sorted(rows)) if rows else {}
        score = {r: sum(path[steps]) for r, path in sdi.items()}
        remain = {}
        for side, some in shown.items():
            order = sorted(score, key=lambda r: (-score[r], r) if side == "helpful" else (score[r], r))
            remain[side] = len({*some} & {*order[: len(some)]})
        listed = [r for some in shown.values() for r in some]
        return {
            "rows": {str(r): {"score": score[r], "sdi": sdi[r]} for r in listed},
            "remain": remain,
            "candidates": len(rows),
        }

    return explorer.scored.kept("exact", what, (k, first, last), make)


def tokens(
    explorer: Explorer,
    row: int,
    train: int,
    *,
    parameters: str = "",
    score: str = "",
    checkpoint: int | None = None,
) -> dict[str, Any]:
    """Influence of each token of one training example on one query, by step of the query.

    Raises:
        StepInfluenceError, ValueError: as for :meth:`RunModel.by_token`, or the model must not be run.
    """
    model, what = _model(explorer), What(row, score, checkpoint, parameters)
    explorer.sides["train"].require(train)

    def make() -> dict[str, Any]:
        [found] = model.by_token(explorer, what, [train])
        return as_shown(found)

    return explorer.scored.kept("tokens", what, train, make)


def as_shown(found: TokenInfluence) -> dict[str, Any]:
    """A training example's tokens and their influence ``(tokens, steps)`` on one query."""
    return {
        "tokens": [visible(token) for token in found.tokens[:TOKENS_SHOWN]],
        "sdi": found.sdi[0][:TOKENS_SHOWN].tolist(),
        "more": max(0, len(found.tokens) - TOKENS_SHOWN),
    }


def _model(explorer: Explorer) -> RunModel:
    if explorer.model is None:
        raise StoreError(f"model: {explorer.no_model or 'there is none to recompute with'}")
    return explorer.model
