"""Answers that need the model itself: exact influence, and influence by token. They run the run's project."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

from stepinfluence.app.runs.by_token import TokenFeatures, token_features
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.examples import TOKENS_SHOWN
from stepinfluence.app.view.explore.scored import What
from stepinfluence.display.words import visible
from stepinfluence.errors import StoreError
from stepinfluence.search import exact_rows

CANDIDATES, MOST_CANDIDATES = 4, 200
"""Rows on either side that are recomputed for each row that is shown, and altogether unless more are shown."""

TOKEN_BYTES = 256 << 20
"""Features of recent examples by token that are kept."""


class RunModel:
    """The model of a run, one question at a time."""

    def __init__(self, run: StoredRun) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._tokens: OrderedDict[int, TokenFeatures] = OrderedDict()

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
        shown = found[0, :, explorer.taken(what.query)]
        return {row: shown[k].tolist() for k, row in enumerate(sorted(rows))}

    def by_token(self, explorer: Explorer, what: What, rows: list[int]) -> dict[int, dict[str, Any]]:
        """Tokens of some training examples, and their influence ``(tokens, steps)`` on one query, by row.

        Raises:
            StepInfluenceError, ValueError: as for :func:`.token_features`.
        """
        assert what.query is not None
        explorer.scored.require_query(what.query)
        query = [explorer.query.features(k, [what.query]) for k in range(len(explorer.query.checkpoints))]
        with self._lock:
            missing = [row for row in rows if row not in self._tokens]
            self._tokens.update((one.row, one) for one in token_features(self._run, explorer.train, missing))
            found = {}
            for row in rows:
                self._tokens.move_to_end(row)
                one = self._tokens[row]
                sdi = one.influence(
                    query,
                    etas=explorer.scored.etas(what.checkpoint, what.score),
                    parameters=what.parameters or None,
                    curvature=explorer.scored.choice(what.score),
                )
                found[row] = {
                    "tokens": [visible(token) for token in one.tokens[:TOKENS_SHOWN]],
                    "sdi": sdi[0][:TOKENS_SHOWN, explorer.taken(what.query)].tolist(),
                    "more": max(0, len(one.tokens) - TOKENS_SHOWN),
                }
            while len(self._tokens) > 1 and sum(map(_bytes, self._tokens.values())) > TOKEN_BYTES:
                self._tokens.popitem(last=False)
        return found


def _bytes(one: TokenFeatures) -> int:
    return sum(f.values.numel() * f.values.element_size() for f in one.features)


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
        score = {r: float(sum(path[steps])) for r, path in sdi.items()}
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

    return explorer.scored.kept("tokens", what, train, lambda: model.by_token(explorer, what, [train])[train])


def _model(explorer: Explorer) -> RunModel:
    if explorer.model is None:
        raise StoreError(f"model: {explorer.no_model or 'there is none to recompute with'}")
    return explorer.model
