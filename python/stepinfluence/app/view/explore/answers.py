"""What the explorer shows, as plain values. The first question about a query costs one scan of the training rows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepinfluence import search
from stepinfluence.attribution.aggregation import dominating, energy_shares, first_order_unit
from stepinfluence.attribution.curvature import Choice, Curvature
from stepinfluence.attribution.features import Features
from stepinfluence.display.words import visible
from stepinfluence.errors import StoreError
from stepinfluence.store import Store, StoredRow

Array = npt.NDArray[np.float32]

TEXT_IN_LISTS = 300
"""Characters of an example's text shown in lists; the whole text comes with the example itself."""

TEXT_LIMIT = 1_000_000
"""Characters of one example's text that are sent at all."""

CACHE_BYTES = 512 << 20
"""Scores ``(n_train, steps)`` of recent queries that are kept."""

MOST_KEPT = 4096
"""Questions whose answers are kept at all, however small they are."""

PATTERN_LIMIT = 500
"""Characters of a pattern of parameters."""

MOST_ROWS = 1000
"""The largest k that a list may have."""

CORRECTED, SDI = "corrected", "sdi"
NAMES = {CORRECTED: "corrected for curvature", SDI: "SDI (the paper's)"}


class Explorer:
    """Answers about a run's training store and query store. Safe to use from several threads.

    Attributes:
        train, query: the stores.
        title: of the page.
    """

    def __init__(
        self,
        train: Store,
        query: Store,
        *,
        title: str = "",
        curvatures: Sequence[Curvature] | None = None,
        uncorrected: str = "",
    ) -> None:
        """Check the two stores against each other.

        Args:
            title: of the page.
            curvatures: of the training rows at each checkpoint; scores corrected with them are then shown first.
            uncorrected: why there are none, where they were wanted.

        Raises:
            FeatureMismatchError: they cannot be compared (says what differs).
            StoreError: one is incomplete, or the queries are not stored per step.
        """
        for store in (train, query):
            if not store.complete:
                raise StoreError(
                    f"{store.path}: incomplete: {store.missing_count} shards are missing; featurize again to resume"
                )
        if not query.per_step:
            raise StoreError(f"{query.path}: holds rows summed over steps; featurize the queries with --per-step")
        if not len(train) or not len(query):
            raise StoreError(f"{(query if len(train) else train).path}: has no rows; there is nothing to show")
        train.require_comparable(query)
        if train.manifest.fold != query.manifest.fold:
            raise StoreError(f"{query.path}: its checkpoints are folded otherwise than {train.path}'s; fold both alike")
        self.train, self.query = train, query
        self.title = title or train.path.resolve().parent.name
        self.uncorrected = uncorrected
        self._curvatures: dict[str, Choice] = {SDI: "none"}
        if curvatures is not None:
            self._curvatures = {CORRECTED: list(curvatures), SDI: "none"}
        self._lock = threading.Lock()
        self._scores: OrderedDict[tuple[int, str, str], Array] = OrderedDict()
        self._energies: OrderedDict[tuple[int, str, str], npt.NDArray[np.float64]] = OrderedDict()

    @classmethod
    def open(
        cls,
        run: str | Path,
        *,
        train: str = "train",
        query: str = "",
        curvatures: Callable[[Store], tuple[Sequence[Curvature] | None, str]] = lambda _: (None, ""),
    ) -> Explorer:
        """Open a run folder.

        Args:
            run: the folder that ``sdi featurize --out`` wrote.
            train: name of the split whose rows are the training examples.
            query: name of the split whose rows are the queries; if not given, the only other one that is per step.
            curvatures: gives the curvatures of the training store, or None and the reason.

        Raises:
            StoreError: no such split, or it is not clear which one the queries are.
            FeatureMismatchError: as for :class:`Explorer`.
        """
        run = Path(run)
        if not run.is_dir():
            raise StoreError(f"{run}: no such run folder; sdi featurize makes one")
        splits = sorted(p.name for p in run.iterdir() if (p / "manifest.json").is_file())
        if train not in splits:
            raise StoreError(f"{run}: has no split {train!r} (it has {', '.join(splits) or 'none'}); use --train")
        if not query:
            others = [s for s in splits if s != train and Store.open(run / s).per_step]
            if len(others) != 1:
                found = f"has {', '.join(others)}" if others else "has no other split stored per step"
                raise StoreError(f"{run}: {found}; name the queries' split with --query")
            query = others[0]
        elif query not in splits:
            raise StoreError(f"{run}: has no split {query!r} (it has {', '.join(splits)}); use --query")
        store = Store.open(run / train)
        fitted, why = curvatures(store)
        return cls(store, Store.open(run / query), title=run.resolve().name, curvatures=fitted, uncorrected=why)

    # ------------------------------------------------------------------------------------------------------------
    # Answers

    def overview(self) -> dict[str, Any]:
        """What there is: counts, steps, checkpoints, parameters."""
        space = self.train.checkpoints[0].space
        return {
            "title": visible(self.title),
            "train": len(self.train),
            "queries": len(self.query),
            "failed": {"train": len(self.train.failed), "query": len(self.query.failed)},
            "steps": self.query.steps,
            "trainSteps": self.train.steps if self.train.per_step else 0,
            "labels": [visible(label) for label in self.query.step_labels],
            "checkpoints": [{"name": visible(c.name), "eta": c.eta} for c in self.train.checkpoints],
            "scores": [{"key": key, "name": NAMES[key]} for key in self._curvatures],
            "uncorrected": visible(self.uncorrected),
            "unit": first_order_unit([c.eta for c in self.train.checkpoints]),
            "parameters": [visible(b.name) for b in space.blocks] if space.layout == "concat" else [],
            "sketched": space.kind == "sketch",
        }

    def queries(self, *, find: str = "", offset: int = 0, limit: int = 100) -> dict[str, Any]:
        """Queries in order, optionally those whose id or text contains ``find`` (case does not matter)."""
        if offset < 0 or not 1 <= limit <= MOST_ROWS:
            raise ValueError(f"limit: got offset {offset} and limit {limit}; use 0 or more, and 1 to {MOST_ROWS}")
        losses = self.query.losses(len(self.query.checkpoints) - 1)
        wanted = find.casefold()
        found, items = 0, []
        for row in range(len(self.query)):
            if not wanted and not offset <= row < offset + limit:
                continue
            stored = self.query.row(row)
            if wanted and wanted not in str(stored.id).casefold() and wanted not in (stored.text or "").casefold():
                continue
            if offset <= (found if wanted else row) < offset + limit:
                items.append({**_short(stored), "loss": _number(losses[row]), "failed": row in self.query.failed})
            found += 1
        return {"total": found if wanted else len(self.query), "items": items}

    def example(self, side: str, row: int) -> dict[str, Any]:
        """Everything about one example of ``"train"`` or ``"query"``."""
        store = self._store(side)
        self._check_row(side, row)
        stored = store.row(row)
        text = stored.text or ""
        tokens = stored.metadata.get("tokens")
        return {
            **_short(stored),
            "text": _shown(text[:TEXT_LIMIT]),
            "cut": max(0, len(text) - TEXT_LIMIT),
            "tokens": [visible(str(t)) for t in tokens] if isinstance(tokens, list) else [],
            "metadata": {visible(str(k)): visible(str(v)) for k, v in stored.metadata.items() if k != "tokens"},
            "losses": [_number(store.losses(k)[row]) for k in range(len(store.checkpoints))],
            "failed": visible(store.failed.get(row, "")),
        }

    def curve(self, row: int, *, parameters: str = "", score: str = "") -> dict[str, Any]:
        """Energy ``sum_z |I_t|`` and signed sum by step (paper, D.3), and the energy's share in the later half.

        Also each checkpoint's share of the energy, and a sentence where one holds most of it.
        """
        scores = self.scores(row, parameters, score)
        energy, signed = np.nansum(np.abs(scores), 0), np.nansum(scores, 0)
        total = float(energy.sum())
        by_checkpoint = self._energy(row, parameters, score)
        owner = dominating(by_checkpoint, [visible(c.name) for c in self.train.checkpoints])
        late = float(energy[len(energy) // 2 :].sum())
        return {
            "energy": energy.tolist(),
            "signed": signed.tolist(),
            "lateMass": late / total if total else 0.0,
            "shares": energy_shares(by_checkpoint).tolist(),
            "dominance": owner.sentence if owner else "",
            "helpful": int((scores.sum(1) > 0).sum()),
            "harmful": int((scores.sum(1) < 0).sum()),
        }

    def top(
        self,
        row: int,
        *,
        k: int = 10,
        first: int = 1,
        last: int | None = None,
        parameters: str = "",
        score: str = "",
    ) -> dict[str, Any]:
        """The most helpful and most harmful training examples by influence in steps ``first..last`` (1-based)."""
        if not 1 <= k <= MOST_ROWS:
            raise ValueError(f"k: got {k}; use 1 to {MOST_ROWS}")
        scores = self.scores(row, parameters, score)
        ranked = scores[:, self._steps(first, last)].sum(1)
        known = np.flatnonzero(~np.isnan(ranked))
        order = known[np.argsort(-ranked[known], kind="stable")]
        sides = {
            "helpful": [r for r in order[:k] if ranked[r] > 0],
            "harmful": [r for r in order[::-1][:k] if ranked[r] < 0],
        }
        return {
            side: [
                {**_short(self.train.row(int(r))), "score": float(ranked[r]), "sdi": scores[r].tolist()} for r in rows
            ]
            for side, rows in sides.items()
        }

    def pair(self, row: int, train: int, *, score: str = "") -> dict[str, Any]:
        """One training example and one query: influence by step and parameter, and by both sides' steps (eq. 9)."""
        self._check_row("query", row)
        self._check_row("train", train)
        by_block: dict[str, npt.NDArray[np.float64]] = {}
        matrix: Tensor | None = None
        asked = self._asked(row, score)
        for k, checkpoint in enumerate(self.train.checkpoints):
            left = self.train.features(k, [train]).values[0]
            right = asked[k].values[0] * checkpoint.eta
            if left.dim() == 2:
                term = left @ right.T
                matrix = term if matrix is None else matrix + term
            summed = left.sum(0) if left.dim() == 2 else left
            if checkpoint.space.layout == "concat":
                for block in checkpoint.space.blocks:
                    columns = slice(block.start, block.stop)
                    value = (right[:, columns] @ summed[columns]).double().numpy()
                    by_block[block.name] = by_block.get(block.name, 0) + value
        return {
            "train": self.example("train", train),
            "sdi": self.scores(row, "", score)[train].tolist(),
            "parameters": [{"name": visible(name), "sdi": value.tolist()} for name, value in by_block.items()],
            "matrix": matrix.tolist() if matrix is not None else None,
        }

    def compare(self, row: int, other: int, *, k: int = 200, score: str = "") -> dict[str, Any]:
        """Two queries: what the same training examples do to each. The k examples that matter most to either."""
        if not 1 <= k <= MOST_ROWS:
            raise ValueError(f"k: got {k}; use 1 to {MOST_ROWS}")
        a, b = self.scores(row, "", score).sum(1), self.scores(other, "", score).sum(1)
        known = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(known, a, 0), np.where(known, b, 0)
        size = np.where(known, np.maximum(np.abs(a) / _scale(a), np.abs(b) / _scale(b)), -np.inf)
        chosen = [int(r) for r in np.argsort(-size, kind="stable")[:k] if known[r]]
        varied = known.sum() > 1 and a[known].std() > 0 and b[known].std() > 0
        return {
            "correlation": float(np.corrcoef(a[known], b[known])[0, 1]) if varied else None,
            "points": [{**_short(self.train.row(r)), "a": float(a[r]), "b": float(b[r])} for r in chosen],
        }

    # ------------------------------------------------------------------------------------------------------------

    def scores(self, row: int, parameters: str = "", score: str = "") -> Array:
        """``(n_train, steps)`` float32: influence of every training row on one query; NaN for rows that failed.

        Args:
            row: of the query.
            parameters: a name or pattern; all if empty.
            score: one of the overview's ``scores``; the first if empty.

        Raises:
            ValueError: no such row or score, the query failed, or ``parameters`` fits none.
        """
        self._check_row("query", row)
        if len(parameters) > PATTERN_LIMIT:
            raise ValueError(f"parameters: got {len(parameters)} characters; a pattern has at most {PATTERN_LIMIT}")
        if row in self.query.failed:
            raise ValueError(f"query {row}: has no features ({self.query.failed[row]})")
        with self._lock:
            key = row, parameters, score
            if key in self._scores:
                self._scores.move_to_end(key)
                return self._scores[key]
            found = search.scores(
                self.train,
                self._features(row),
                parameters=parameters or None,
                curvature=self._choice(score),
                progress=False,
            )
            self._scores[key] = found.sdi[:, 0].float().numpy()
            # All answers have the same size, but for a batch of steps.
            most = max(1, min(MOST_KEPT, CACHE_BYTES // max(1, self._scores[key].nbytes)))
            while len(self._scores) > most:
                self._scores.popitem(last=False)
            return self._scores[key]

    def _choice(self, score: str) -> Choice:
        if score and score not in self._curvatures:
            raise ValueError(f"score: got {score!r}; use {' or '.join(self._curvatures)}")
        return self._curvatures[score or next(iter(self._curvatures))]

    def _features(self, row: int) -> list[Features]:
        return [self.query.features(k, [row]) for k in range(len(self.query.checkpoints))]

    def _asked(self, row: int, score: str) -> list[Features]:
        """A query's features as its scores are made of, one per checkpoint."""
        choice, plain = self._choice(score), self._features(row)
        if isinstance(choice, str):
            return plain
        return [one.transform(features) for one, features in zip(choice, plain, strict=True)]  # type: ignore[arg-type]

    def _energy(self, row: int, parameters: str, score: str) -> npt.NDArray[np.float64]:
        """``(K,)`` energy of one query by checkpoint."""
        with self._lock:
            key = row, parameters, score
            if key not in self._energies:
                features, choice = self._features(row), self._choice(score)
                found = search.checkpoint_energy(self.train, features, parameters=parameters or None, curvature=choice)[
                    :, 0
                ]
                self._energies[key] = found
                while len(self._energies) > MOST_KEPT:
                    self._energies.popitem(last=False)
            return self._energies[key]

    def _steps(self, first: int, last: int | None) -> slice:
        count = self.query.steps
        last = count if last is None else last
        if not 1 <= first <= last <= count:
            raise ValueError(f"steps: got {first} to {last}; use steps from 1 to {count}")
        return slice(first - 1, last)

    def _store(self, side: str) -> Store:
        if side not in ("train", "query"):
            raise ValueError(f"side: got {side!r}; use 'train' or 'query'")
        return self.train if side == "train" else self.query

    def _check_row(self, side: str, row: int) -> None:
        count = len(self._store(side))
        if not 0 <= row < count:
            raise ValueError(f"{side}: got row {row}; there are rows 0 to {count - 1}")


def _short(stored: StoredRow) -> dict[str, Any]:
    text = stored.text or ""
    cut = "…" if len(text) > TEXT_IN_LISTS else ""
    return {"row": stored.row, "id": visible(str(stored.id)[:200]), "text": visible(text[:TEXT_IN_LISTS]) + cut}


def _shown(text: str) -> str:
    """Control characters spelled out, line by line: the page keeps line breaks of a whole text."""
    return "\n".join(visible(line) for line in text.splitlines())


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _scale(values: Array) -> float:
    return float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
