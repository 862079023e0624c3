"""What the explorer shows of one query, as plain values. Its first question costs one scan of the training rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.app.runs.answers import Answered, read_answers
from stepinfluence.app.runs.curvatures import Correction, curvature_named
from stepinfluence.app.view.explore.examples import MOST_ROWS, Side
from stepinfluence.app.view.explore.scored import CORRECTED, SDI, Array, Scored, What, leading
from stepinfluence.attribution.aggregation import OF_AN_EXAMPLE, dominating, energy_shares, first_order_unit
from stepinfluence.attribution.curvature import Choice, Curvature, Unrolled
from stepinfluence.attribution.extremes import TOO_LARGE
from stepinfluence.attribution.features import Features
from stepinfluence.display.words import visible
from stepinfluence.errors import StoreError
from stepinfluence.search import checkpoint_energy
from stepinfluence.store import Store

if TYPE_CHECKING:
    from stepinfluence.app.view.explore.model import RunModel

NAMES = {CORRECTED: "corrected for curvature", SDI: "SDI (the paper's)"}


class Explorer:
    """Answers about a run's training store and query store. Safe to use from several threads.

    Attributes:
        train, query: the stores.
        sides: their examples.
        scored: scores of the training rows.
        title: of the page.
        model: what answers from the model itself; None where it must not be run, and why in ``no_model``.
    """

    def __init__(
        self,
        train: Store,
        query: Store,
        *,
        title: str = "",
        curvatures: Correction | None = None,
        uncorrected: str = "",
        answers: Mapping[int, Answered] | None = None,
        model: RunModel | None = None,
        no_model: str = "",
    ) -> None:
        """Check the two stores against each other.

        Args:
            title: of the page.
            curvatures: of the training rows at each checkpoint, or SOURCE; scores corrected so are then shown first.
            uncorrected: why there are none, where they were wanted.
            answers: of the model to the queries, by row.
            model, no_model: as above.

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
        self.sides = {"train": Side("train", train), "query": Side("query", query, answers)}
        self.title = title or train.path.resolve().parent.name
        self.uncorrected = uncorrected
        self.model, self.no_model = model, no_model
        self._curvatures: dict[str, Choice] = {SDI: "none"}
        if curvatures is not None:
            fitted = curvatures if isinstance(curvatures, Unrolled) else list(curvatures)
            self._curvatures = {CORRECTED: fitted, SDI: "none"}
        self.scored = Scored(train, query, self._curvatures)

    @classmethod
    def open(
        cls,
        run: str | Path,
        *,
        train: str = "train",
        query: str = "",
        curvatures: Callable[[Store], tuple[Correction | None, str]] = lambda _: (None, ""),
        model: RunModel | None = None,
        no_model: str = "",
    ) -> Explorer:
        """Open a run folder.

        Args:
            run: the folder that ``sdi featurize --out`` wrote.
            train: name of the split whose rows are the training examples.
            query: name of the split whose rows are the queries; if not given, the only other one that is per step.
            curvatures: gives the curvatures of the training store, or None and the reason.
            model, no_model: as for :class:`Explorer`.

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
        store, asked = Store.open(run / train), Store.open(run / query)
        fitted, why = curvatures(store)
        return cls(
            store,
            asked,
            title=run.resolve().name,
            curvatures=fitted,
            uncorrected=why,
            answers=read_answers(asked),
            model=model,
            no_model=no_model,
        )

    # ------------------------------------------------------------------------------------------------------------
    # Answers

    def overview(self) -> dict[str, Any]:
        """What there is: counts, steps, checkpoints, parameters."""
        space = self.train.checkpoints[0].space
        return {
            "title": visible(self.title),
            "train": len(self.train),
            "queries": len(self.query),
            "failed": {name: len(side.failed) for name, side in self.sides.items()},
            "steps": self.query.steps,
            "trainSteps": self.train.steps if self.train.per_step else 0,
            "labels": [visible(label) for label in self.query.step_labels],
            "checkpoints": [{"name": visible(c.name), "eta": c.eta} for c in self.train.checkpoints],
            "scores": [{"key": key, "name": self._name(key)} for key in self._curvatures],
            "uncorrected": visible(self.uncorrected),
            "unit": self._unit(),
            "parameters": [visible(b.name) for b in space.blocks] if space.layout == "concat" else [],
            "sketched": space.kind == "sketch",
            "folded": self.train.manifest.fold is not None,
            "model": self.model is not None,
            "noModel": visible(self.no_model),
        }

    def _unit(self) -> str:
        own = first_order_unit([c.eta for c in self.train.checkpoints])
        through = any(isinstance(one, Unrolled) for one in self._curvatures.values())
        return f"{own} (SOURCE: {OF_AN_EXAMPLE})" if through else own

    def _name(self, score: str) -> str:
        found = self.curvatures(score)
        if found is None or isinstance(found, Unrolled):
            return NAMES[score] if found is None else curvature_named(found)
        return f"{NAMES[score]}: {curvature_named(found)}"

    def queries(self, *, find: str = "", offset: int = 0, limit: int = 100) -> dict[str, Any]:
        """As :meth:`.Side.listed`."""
        return self.sides["query"].listed(find=find, offset=offset, limit=limit)

    def example(self, side: str, row: int) -> dict[str, Any]:
        """Everything about one example of ``"train"`` or ``"query"``."""
        if side not in self.sides:
            raise ValueError(f"side: got {side!r}; use 'train' or 'query'")
        return self.sides[side].whole(row)

    def curve(
        self, row: int, *, parameters: str = "", score: str = "", checkpoint: int | None = None
    ) -> dict[str, Any]:
        """Energy ``sum_z |I_t|`` and signed sum by step (paper, D.3), and the energy's share in the later half.

        Also each checkpoint's share of the energy, and a sentence where one holds most of it.
        """
        what = What(row, score, checkpoint, parameters)
        profile = self.profile(what)
        by_checkpoint = self._energy(what)
        owner = dominating(by_checkpoint, [visible(c.name) for c in self.train.checkpoints])
        return {
            **profile,
            "shares": energy_shares(by_checkpoint).tolist(),
            "dominance": owner.sentence if owner else "",
        }

    def profile(self, what: What) -> dict[str, Any]:
        """Energy and signed sum of some influence by step, its share in the later half, and how many rows help."""

        def make() -> dict[str, Any]:
            scores = torch.from_numpy(self.scored.scores(what))[:, self.taken(what.query)]
            totals = self.scored.totals(what, slice(0, self.query.steps))
            energy, signed = scores.abs().nansum(0).numpy(), scores.nansum(0).numpy()
            if not np.isfinite(energy).all():
                raise ValueError(TOO_LARGE)
            total, late = float(energy.sum()), float(energy[len(energy) // 2 :].sum())
            return {
                "energy": energy.tolist(),
                "signed": signed.tolist(),
                "lateMass": late / total if total else 0.0,
                "helpful": int((totals > 0).sum()),
                "harmful": int((totals < 0).sum()),
            }

        return self.scored.kept("profile", what, None, make)

    def top(
        self,
        row: int,
        *,
        k: int = 10,
        first: int = 1,
        last: int | None = None,
        parameters: str = "",
        score: str = "",
        checkpoint: int | None = None,
    ) -> dict[str, Any]:
        """The most helpful and most harmful training examples by influence in steps ``first..last`` (1-based)."""
        return self.ranked(What(row, score, checkpoint, parameters), k=k, first=first, last=last)

    def ranked(self, what: What, *, k: int, first: int = 1, last: int | None = None) -> dict[str, Any]:
        """:meth:`top` of any influence."""
        scores = self.scored.scores(what)
        values, taken = self.scored.totals(what, self.steps(first, last)), self.taken(what.query)
        rows, side = self.leading_rows(what, k=k, first=first, last=last), self.sides["train"]
        return {
            name: [{**side.short(r), "score": float(values[r]), "sdi": scores[r][taken].tolist()} for r in some]
            for name, some in rows.items()
        }

    def leading_rows(self, what: What, *, k: int, first: int = 1, last: int | None = None) -> dict[str, list[int]]:
        """The rows of :meth:`ranked`, best first on either side."""
        if not 1 <= k <= MOST_ROWS:
            raise ValueError(f"k: got {k}; use 1 to {MOST_ROWS}")
        steps = self.steps(first, last)

        def make() -> dict[str, list[int]]:
            values = self.scored.totals(what, steps)
            return {
                "helpful": [r for r in leading(values, k) if values[r] > 0],
                "harmful": [r for r in leading(values, k, smallest=True) if values[r] < 0],
            }

        return self.scored.kept("leading", what, (k, steps.start, steps.stop), make)

    def pair(self, row: int, train: int, *, score: str = "", checkpoint: int | None = None) -> dict[str, Any]:
        """One training example and one query: influence by step and parameter, and by both sides' steps (eq. 9)."""
        self.sides["query"].require(row)
        self.sides["train"].require(train)
        by_block: dict[str, npt.NDArray[np.float64]] = {}
        matrix: Tensor | None = None
        taken = self.taken(row)
        asked, etas = self._asked(row, score), self.scored.etas(checkpoint, score)
        whole = self.scored.etas(None, score)
        parts = []
        for k, one in enumerate(self.train.checkpoints):
            left = self.train.features(k, [train]).values[0]
            summed = left.sum(0) if left.dim() == 2 else left
            parts.append((asked[k].values[0, taken] @ summed * whole[k]).tolist())
            if checkpoint is not None and k != checkpoint:
                continue
            right = asked[k].values[0, taken] * etas[k]
            if left.dim() == 2:
                term = left[self.sides["train"].taken(train)] @ right.T
                matrix = term if matrix is None else matrix + term
            if one.space.layout == "concat":
                for block in one.space.blocks:
                    columns = slice(block.start, block.stop)
                    value = (right[:, columns] @ summed[columns]).double().numpy()
                    by_block[block.name] = by_block.get(block.name, 0) + value
        return {
            "train": self.example("train", train),
            "sdi": self.scores(row, "", score, checkpoint)[train][taken].tolist(),
            "byCheckpoint": parts,
            "parameters": [{"name": visible(name), "sdi": value.tolist()} for name, value in by_block.items()],
            "matrix": matrix.tolist() if matrix is not None else None,
        }

    def compare(
        self, row: int, other: int, *, k: int = 200, score: str = "", checkpoint: int | None = None
    ) -> dict[str, Any]:
        """Two queries: what the same training examples do to each. The k examples that matter most to either."""
        if not 1 <= k <= MOST_ROWS:
            raise ValueError(f"k: got {k}; use 1 to {MOST_ROWS}")
        everything = slice(0, self.query.steps)
        a, b = (self.scored.totals(What(query, score, checkpoint), everything) for query in (row, other))
        known = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(known, a, 0), np.where(known, b, 0)
        size = np.where(known, np.maximum(np.abs(a) / _scale(a), np.abs(b) / _scale(b)), np.nan)
        varied = known.sum() > 1 and a[known].std() > 0 and b[known].std() > 0
        return {
            "correlation": float(np.corrcoef(a[known], b[known])[0, 1]) if varied else None,
            "points": [{**self.sides["train"].short(r), "a": float(a[r]), "b": float(b[r])} for r in leading(size, k)],
        }

    # ------------------------------------------------------------------------------------------------------------

    def taken(self, row: int | None) -> slice:
        """Places of the steps that a query took; all steps for queries together (None)."""
        return slice(0, self.query.steps) if row is None else self.sides["query"].taken(row)

    def scores(self, row: int, parameters: str = "", score: str = "", checkpoint: int | None = None) -> Array:
        """``(n_train, steps)`` float32: influence of every training row on one query; NaN for rows that failed.

        Args:
            row: of the query.
            parameters: a name or pattern; all if empty.
            score: one of the overview's ``scores``; the first if empty.
            checkpoint: that one alone; the sum over all if None.

        Raises:
            ValueError: no such row, score or checkpoint, the query failed, or ``parameters`` fits none.
        """
        return self.scored.scores(What(row, score, checkpoint, parameters))

    def curvatures(self, score: str) -> Correction | None:
        """What a score is corrected with; None for SDI.

        Raises:
            ValueError: there is no such score.
        """
        choice = self.scored.choice(score)
        return None if isinstance(choice, str | Curvature) else choice

    def _asked(self, row: int, score: str) -> list[Features]:
        """A query's features as its scores are made of, one per checkpoint."""
        self.scored.require_query(row)
        plain = [self.query.features(k, [row]) for k in range(len(self.query.checkpoints))]
        found = self.curvatures(score)
        if isinstance(found, Unrolled):
            return found.transform(plain[-1])
        return plain if found is None else [c.transform(f) for c, f in zip(found, plain, strict=True)]

    def _energy(self, what: What) -> npt.NDArray[np.float64]:
        """``(K,)`` energy of one query by checkpoint."""
        whole = replace(what, checkpoint=None)

        def make() -> npt.NDArray[np.float64]:
            assert what.query is not None
            if len(self.train.checkpoints) == 1:
                return np.ones(1)
            features = [self.query.features(k, [what.query]) for k in range(len(self.query.checkpoints))]
            choice, parameters = self.scored.choice(what.score), what.parameters or None
            return checkpoint_energy(self.train, features, parameters=parameters, curvature=choice)[:, 0]

        return self.scored.kept("energy", whole, None, make)

    def steps(self, first: int, last: int | None) -> slice:
        """Places of the steps ``first..last`` (1-based).

        Raises:
            ValueError: the queries have no such steps.
        """
        count = self.query.steps
        last = count if last is None else last
        if not 1 <= first <= last <= count:
            raise ValueError(f"steps: got {first} to {last}; use steps from 1 to {count}")
        return slice(first - 1, last)


def _scale(values: Array) -> float:
    return float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
