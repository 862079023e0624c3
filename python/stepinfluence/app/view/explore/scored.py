"""Scores of all training rows, by a query or by all queries together, kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from stepinfluence import search
from stepinfluence.attribution.curvature import Choice, Unrolled
from stepinfluence.search.question import Question
from stepinfluence.search.scan import score_blocks
from stepinfluence.store import Store

Array: TypeAlias = npt.NDArray[np.float32]
Kept = TypeVar("Kept")
Key = TypeVar("Key")

CACHE_BYTES = 512 << 20
"""Scores ``(n_train, steps)`` of recent queries that are kept."""

MOST_KEPT = 4096
"""Answers of a kind that are kept at all, however small they are."""

TOTALS_KEPT = 16
"""Sums over steps ``(n_train,)`` that are kept."""

PATTERN_LIMIT = 500
"""Characters of a pattern of parameters."""

MOST_TOGETHER = 512
"""Queries that all queries together stand for, at most."""

QUERIES_TOGETHER = 128
"""Queries whose features are held at a time when all are added up."""

CORRECTED, SDI = "corrected", "sdi"
ALIKE, BY_SIZE = "alike", "size"


@dataclass(frozen=True)
class What:
    """Which influence is looked at.

    Attributes:
        query: row of the query; None for all queries together.
        score: ``"corrected"`` or ``"sdi"``; the first there is if empty.
        checkpoint: that checkpoint alone, with its eta; None for the sum over all.
        parameters: a name or pattern of parameters; all if empty.
        weights: of all queries together: ``"alike"``: the mean, each query's gradient scaled to length one; ``"size"``:
            the sum, queries with larger gradients counting more.
    """

    query: int | None
    score: str = ""
    checkpoint: int | None = None
    parameters: str = ""
    weights: str = ALIKE


class Scored:
    """Questions to the training rows of a store, and their scores. Safe to use from several threads."""

    def __init__(self, train: Store, query: Store, curvatures: Mapping[str, Choice]) -> None:
        self._train, self._query, self._curvatures = train, query, curvatures
        self._lock = threading.Lock()
        self._making: dict[Any, threading.Lock] = {}
        self._scores: OrderedDict[What, Array] = OrderedDict()
        self._totals: OrderedDict[Any, npt.NDArray[np.float32]] = OrderedDict()
        self._small: OrderedDict[Any, Any] = OrderedDict()
        self._failed = query.failed

    @property
    def counted(self) -> list[int]:
        """The queries that count where all are looked at together: those with features, or :data:`MOST_TOGETHER` of
        them, evenly spread."""
        rows = [row for row in range(len(self._query)) if row not in self._failed]
        if len(rows) <= MOST_TOGETHER:
            return rows
        return [rows[k] for k in np.linspace(0, len(rows) - 1, MOST_TOGETHER).round().astype(int)]

    def choice(self, score: str) -> Choice:
        """The curvature of a score.

        Raises:
            ValueError: there is no such score.
        """
        if score and score not in self._curvatures:
            raise ValueError(f"score: got {score!r}; use {' or '.join(self._curvatures)}")
        return self._curvatures[score or next(iter(self._curvatures))]

    def etas(self, checkpoint: int | None, score: str) -> list[float]:
        """The weight of each checkpoint in a score: its own (1 for SOURCE, which has learning rates in it), or zero
        where another one alone is looked at.

        Raises:
            ValueError: there is no such checkpoint.
        """
        through = isinstance(self.choice(score), Unrolled)
        etas = [1.0 if through else c.eta for c in self._train.checkpoints]
        if checkpoint is None:
            return etas
        if not 0 <= checkpoint < len(etas):
            raise ValueError(f"checkpoint: got {checkpoint}; there are 0 to {len(etas) - 1}")
        return [eta if k == checkpoint else 0.0 for k, eta in enumerate(etas)]

    def question(self, what: What, *, corrected: bool = True) -> Question:
        """What is asked of the training rows: one query, or all together as one.

        Args:
            corrected: False: as it is without the curvature.

        Raises:
            ValueError: no such row, score, checkpoint or parameters, or the query failed.
        """
        if len(what.parameters) > PATTERN_LIMIT:
            raise ValueError(
                f"parameters: got {len(what.parameters)} characters; a pattern has at most {PATTERN_LIMIT}"
            )
        if what.weights not in (ALIKE, BY_SIZE):
            raise ValueError(f"weights: got {what.weights!r}; use {ALIKE} or {BY_SIZE}")
        if what.query is None:
            return self._together(what, corrected=corrected)
        self.require_query(what.query)
        return self._ask(what, [what.query], corrected=corrected)

    def require_query(self, row: int) -> None:
        """Raise unless there is such a query, and it has features."""
        if not 0 <= row < len(self._query):
            raise ValueError(f"query: got row {row}; there are rows 0 to {len(self._query) - 1}")
        if row in self._failed:
            raise ValueError(f"query {row}: has no features ({self._failed[row]})")

    def _ask(self, what: What, rows: list[int], *, corrected: bool) -> Question:
        features = [self._query.features(k, rows, numbered=True) for k in range(len(self._query.checkpoints))]
        return search.ask(
            self._train,
            features,
            etas=self.etas(what.checkpoint, what.score if corrected else SDI),
            parameters=what.parameters or None,
            curvature=self.choice(what.score) if corrected else "none",
        )

    def _together(self, what: What, *, corrected: bool) -> Question:
        rows = self.counted
        if not rows:
            raise ValueError("queries: none has features")
        total: list[torch.Tensor] = []
        question = None
        for start in range(0, len(rows), QUERIES_TOGETHER):
            question = self._ask(what, rows[start : start + QUERIES_TOGETHER], corrected=corrected)
            weights = torch.ones(len(question.query_ids), dtype=torch.float64)
            if what.weights == ALIKE:
                sizes = sum(v.sum(1).double().square().sum(1) for v in question.vectors)
                assert isinstance(sizes, torch.Tensor)
                sizes = sizes.sqrt().cpu()
                weights = torch.where(sizes > 0, 1 / sizes, 0.0) / len(rows)
            part = [torch.einsum("q,qsd->sd", weights.to(v), v).unsqueeze(0) for v in question.vectors]
            total = part if not total else [a + b for a, b in zip(total, part, strict=True)]
        assert question is not None
        return replace(question, vectors=tuple(total), query_ids=("all",), valid=np.ones(1, bool))

    def scores(self, what: What) -> Array:
        """``(n_train, steps)`` float32: influence of every training row; NaN for rows that failed.

        Raises:
            ValueError: as for :meth:`question`.
        """

        def scan() -> Array:
            question = self.question(what)
            found = np.empty((len(self._train), question.steps), np.float32)
            first = 0
            with torch.no_grad():
                for block in score_blocks(question, tuple(v.flatten(0, 1) for v in question.vectors)):
                    found[first : first + len(block)] = block.float().cpu().numpy()
                    first += len(block)
            return found

        # All answers have the same size, but for a batch of steps.
        each = max(1, 4 * len(self._train) * self._query.steps)
        return self._once(self._scores, what, scan, max(1, min(MOST_KEPT, CACHE_BYTES // each)))

    def totals(self, what: What, steps: slice) -> npt.NDArray[np.float32]:
        """``(n_train,)``: influence summed over some steps; NaN for rows that failed."""

        def add() -> npt.NDArray[np.float32]:
            return np.asarray(torch.from_numpy(self.scores(what))[:, steps].sum(1).numpy())

        return self._once(self._totals, (what, steps.start, steps.stop), add, TOTALS_KEPT)

    def kept(self, kind: str, what: What, more: Any, make: Callable[[], Kept]) -> Kept:
        """A small answer, made at the first time that it is asked for."""
        found: Kept = self._once(self._small, (kind, what, more), make, MOST_KEPT)
        return found

    def _once(self, kept: OrderedDict[Key, Kept], key: Key, make: Callable[[], Kept], most: int) -> Kept:
        """What is kept under a key. One thread makes it, those that ask for it meanwhile wait, and others do not."""
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
            mine = self._making.setdefault(key, threading.Lock())
        with mine:
            with self._lock:
                if key in kept:
                    return kept[key]
            try:
                found = make()
                with self._lock:
                    kept[key] = found
                    while len(kept) > most:
                        kept.popitem(last=False)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return found


def leading(values: npt.NDArray[Any], k: int, *, smallest: bool = False) -> list[int]:
    """Places of the k largest (or smallest) of some values, best first, ties by the lower place; no NaN among them."""
    known = np.flatnonzero(~np.isnan(values))
    signed = values[known] if smallest else -values[known]
    if len(known) > 4 * k + 64:  # no need to sort them all; equal ones at the border all come along
        border = np.partition(signed, k - 1)[k - 1]
        chosen = np.flatnonzero(signed <= border)
        known, signed = known[chosen], signed[chosen]
    return [int(row) for row in known[np.argsort(signed, kind="stable")[:k]]]
