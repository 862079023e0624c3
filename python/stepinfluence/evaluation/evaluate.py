"""``evaluate``: several attribution methods on one problem, against retraining, over several seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from stepinfluence.evaluation.methods import Method, available
from stepinfluence.evaluation.metrics import (
    Estimate,
    agreement,
    bootstrap,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    pearson,
    randomization_check,
    top_k_overlap,
)
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.result import Evaluation, Figure, Merits, Smoothness, StepMerits, Truth
from stepinfluence.evaluation.retraining import Draws, Retrainings, draws, training_seed
from stepinfluence.evaluation.smoothness import Smooth, smoothness
from stepinfluence.evaluation.steps import StepRun, try_steps
from stepinfluence.evaluation.trained import Scored, Trained
from stepinfluence.evaluation.training import CannotScore
from stepinfluence.progress import tqdm

Array = npt.NDArray[np.float64]
EXACT = "TracIn, exact"

HELPFUL = 0.2
"""Share of the training examples that is left out for the brittleness: those that a method calls most helpful."""


@dataclass(frozen=True)
class _Run:
    """One seed: what was drawn, and the outcomes of every repeat: ``(repeats, halves or left out, n_query)``."""

    seed: int
    drawn: Draws
    full: Array  # (repeats, n_query)
    halves: Array
    changes: Array
    right: npt.NDArray[np.bool_] | None
    smooth: Smooth | None

    @property
    def asked(self) -> npt.NDArray[np.int64]:
        """Queries in the order in which they are asked for the brittleness: those that the first model answers rightly,
        the one nearest to the border (with the highest loss) first; where nothing is right or wrong all, as drawn."""
        if self.right is None:
            return self.drawn.queries
        order = np.argsort(-self.full[0], kind="stable")
        return order[self.right[order]]


class _Figures(NamedTuple):
    """One method in one seed."""

    lds: Estimate
    loo: Estimate
    mislabel: Estimate | None
    brittleness: float | None
    rise: float | None
    overlap: Estimate | None
    randomization: Estimate
    seconds: float
    bytes_per_example: int


def evaluate(
    problem: Problem,
    methods: Mapping[str, Method] | None = None,
    *,
    seeds: int | Sequence[int] = 5,
    subsets: int = 8,
    left_out: int = 6,
    flips: int = 1,
    repeats: int = 2,
    folder: Path | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare methods on a problem.

    Every seed is a run of its own: new initialisations (and whatever else the problem's training draws), new random
    halves, other examples left out, other queries asked. The data are the problem's and the same in every run, so that
    intervals over seeds hold for these data. For each seed ``repeats * (1 + subsets + left_out)`` models are trained
    once for all methods, four with other weights of the examples for the metasmoothness, where the problem has a
    recipe, and ``flips`` for each method.

    Args:
        problem: what to learn.
        methods: by name; all that this machine can run if not given.
        seeds: how many, or which.
        subsets: models of the LDS, each trained on a random half of the examples.
        left_out: examples that are left out one at a time (:class:`~stepinfluence.evaluation.retraining.Draws`).
        flips: queries for the brittleness, of the rightly answered ones those nearest to the border; 0 to leave it out.
        repeats: initialisations of every retraining. Scores, of the first one's model, are held against the mean over
            all; how far they agree says how much of the truth is noise.
        folder: where retrained models are kept, so that stopped work goes on and methods can be added without training
            again; not kept if not given.
        progress: show progress bars.

    Raises:
        ValueError: no seed, one that is given twice, fewer than three subsets, two examples left out or one repeat; or
            ``folder`` holds models of something else.
    """
    which = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not which or len(set(which)) < len(which):
        raise ValueError(f"seeds: got {seeds}; use at least 1, each once")
    if subsets < 3 or left_out < 2 or repeats < 1:
        raise ValueError(f"subsets, left_out, repeats: got {subsets}, {left_out}, {repeats}; use at least 3, 2 and 1")
    chosen = dict(available() if methods is None else methods)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as kept:
        trained = Retrainings(problem, Path(kept))
        runs = _retrain_all(trained, which, subsets, left_out, repeats, progress=progress)
        return _score_all(trained, runs, chosen, flips, progress=progress)


def _retrain_all(
    trained: Retrainings, seeds: Sequence[int], subsets: int, left_out: int, repeats: int, *, progress: bool
) -> list[_Run]:
    total, name = len(seeds) * repeats * (1 + subsets + left_out), trained.problem.name
    with tqdm(total=total, desc=f"{name}: retraining", unit="model", delay=2, disable=not progress) as bar:
        return [
            _retrain(trained, draws(trained.problem, seed, subsets=subsets, left_out=left_out), seed, repeats, bar)
            for seed in seeds
        ]


def _score_all(
    trained: Retrainings, runs: Sequence[_Run], chosen: Mapping[str, Method], flips: int, *, progress: bool
) -> Evaluation:
    problem, repeats = trained.problem, len(runs[0].full)
    found: dict[str, list[_Figures]] = {name: [] for name in chosen}
    steps, unable = [], {}
    total = len(runs) * (len(chosen) + 1)
    with tqdm(total=total, desc=f"{problem.name}: scoring", unit="method", delay=2, disable=not progress) as bar:
        for run in runs:
            model = trained.model(run.seed)
            exact, given = None, Trained(problem, model, training_seed(run.seed, 0))
            for name in sorted(chosen, key=lambda name: name != EXACT):  # the others are compared with it
                bar.update()
                if name in unable:
                    continue
                try:
                    scored = chosen[name](given)
                except CannotScore as error:
                    unable[name] = str(error)
                    continue
                exact = scored.scores if name == EXACT else exact
                found[name].append(
                    _figures(trained, run, chosen[name], scored, exact if name != EXACT else None, flips)
                )
            steps.append(try_steps(problem, model, seed=run.seed))
            bar.update()
    first = [run.right.mean() for run in runs if run.right is not None]
    return Evaluation(
        problem=problem.name,
        seeds=tuple(run.seed for run in runs),
        merits=tuple(_merits(name, by_seed) for name, by_seed in found.items() if name not in unable),
        steps=_steps(steps),
        truth=_truth(runs),
        smoothness=_smoothness(runs),
        about=problem.about,
        unable=unable,
        retrainings=trained.used,
        training_seconds=trained.seconds,
        accuracy=Figure.of([float(share) for share in first]) if first else None,
        asked=tuple(len(run.asked[:flips]) for run in runs),
        repeats=repeats,
    )


def _retrain(trained: Retrainings, drawn: Draws, seed: int, repeats: int, bar: tqdm[Any]) -> _Run:
    everyone = trained.everyone

    def losses(rows: npt.NDArray[np.int64], repeat: int, what: str) -> Array:
        found = trained.outcome(seed, rows, repeat=repeat, what=what).losses
        bar.update()
        return found

    every = range(repeats)
    full = np.stack([losses(everyone, r, "all") for r in every])
    halves = np.stack([[losses(np.flatnonzero(half), r, "half") for half in drawn.halves] for r in every])
    without = np.stack([[losses(np.delete(everyone, k), r, "left out") for k in drawn.left_out] for r in every])
    right = trained.outcome(seed, everyone, what="all").correct
    smooth = None
    if trained.problem.training is not None:
        smooth = smoothness(
            lambda weights: trained.outcome(seed, everyone, what="weighted", weights=weights).losses,
            len(everyone),
            seed=seed,
        )
    return _Run(seed, drawn, full, halves, without - full[:, None], right, smooth)


def _figures(
    trained: Retrainings, run: _Run, method: Method, found: Scored, exact: Array | None, flips: int
) -> _Figures:
    problem, n, seed = trained.problem, len(trained.everyone), run.seed
    fresh: nn.Module = problem.untrained(training_seed(seed, 1))
    again = method(Trained(problem, fresh.eval(), training_seed(seed, 1), untrained=True)).scores
    # Some methods are asked only a few queries.
    scored = [int(q) for q in run.asked[:flips] if not np.isnan(found.scores[:, q]).any()]
    removed = [_without_helpful(trained, run, found, query) for query in scored]
    turned, rise = np.mean(removed, axis=0).tolist() if removed else (float("nan"), float("nan"))
    lds = linear_datamodeling_score(found.scores, run.halves.mean(0), run.drawn.halves)
    loo = leave_one_out_correlation(found.scores, run.changes.mean(0), run.drawn.left_out)
    planted = problem.mislabelled
    none = found.suspicion is None or planted is None
    return _Figures(
        lds=bootstrap(lds, seed=seed),
        loo=bootstrap(loo, seed=seed),
        mislabel=None if none else mislabel_auc(found.suspicion, planted, seed=seed),  # type: ignore[arg-type]
        brittleness=turned if flips and problem.correct else None,
        rise=rise if flips else None,
        overlap=None if exact is None else bootstrap(top_k_overlap(found.scores, exact, max(1, n // 10)), seed=seed),
        randomization=bootstrap(randomization_check(found.scores, again), seed=seed),
        seconds=found.seconds,
        bytes_per_example=found.bytes_per_example,
    )


def _without_helpful(trained: Retrainings, run: _Run, found: Scored, query: int) -> tuple[float, float]:
    """Whether the answer turns when the most helpful examples are left out (1 or 0), and how much its loss rises."""
    count = max(1, round(HELPFUL * len(trained.everyone)))
    helpful = np.argsort(-found.scores[:, query], kind="stable")[:count]
    outcome = trained.outcome(run.seed, np.delete(trained.everyone, helpful), what="most helpful left out")
    turned = outcome.correct is not None and not outcome.correct[query]
    return float(turned), float(outcome.losses[query] - run.full[0][query])


def _merits(name: str, runs: Sequence[_Figures]) -> Merits:
    brittle = [run.brittleness for run in runs if run.brittleness is not None]
    rises = [run.rise for run in runs if run.rise is not None]
    return Merits(
        method=name,
        lds=Figure.of([run.lds for run in runs]),
        loo=Figure.of([run.loo for run in runs]),
        mislabel=_where_known([run.mislabel for run in runs]),
        brittleness=Figure.of_shares(brittle) if brittle else None,
        rise=Figure.of(rises) if rises else None,
        overlap=_where_known([run.overlap for run in runs]),
        randomization=Figure.of([run.randomization for run in runs]),
        seconds=float(np.mean([run.seconds for run in runs])),
        bytes_per_example=runs[0].bytes_per_example,
    )


def _where_known(values: Sequence[Estimate | None]) -> Figure | None:
    known = [v for v in values if v is not None]
    return Figure.of(known) if known else None  # a figure is missing in every seed or in none


def _truth(runs: Sequence[_Run]) -> Truth | None:
    repeated = len(runs[0].full) > 1
    if not repeated and len(runs) == 1:
        return None
    others = [run.full[1] for run in runs] if repeated else [run.full[0] for run in (*runs[1:], runs[0])]
    noise = [float(np.abs(run.full[0] - other).mean()) for run, other in zip(runs, others, strict=True)]
    halves = [bootstrap(agreement(run.halves), seed=run.seed) for run in runs] if repeated else None
    changes = [bootstrap(agreement(run.changes, pearson), seed=run.seed) for run in runs] if repeated else None
    return Truth(
        half_agreement=None if halves is None else Figure.of(halves),
        loo_agreement=None if changes is None else Figure.of(changes),
        loo_change=Figure.of([float(np.abs(run.changes).mean()) for run in runs]),
        noise=Figure.of(noise),
    )


def _smoothness(runs: Sequence[_Run]) -> Smoothness | None:
    found = [run.smooth for run in runs if run.smooth is not None]
    if not found:
        return None
    return Smoothness(Figure.of([one.across_steps for one in found]), Figure.of([one.nearby for one in found]))


def _steps(runs: Sequence[StepRun]) -> StepMerits:
    return StepMerits(
        conservation=max(run.conservation for run in runs),
        counterfactual=Figure.of([run.counterfactual for run in runs]),
        slope=Figure.of([run.slope for run in runs]),
        natural=Figure.of([run.natural for run in runs]),
        natural_slope=Figure.of([run.natural_slope for run in runs]),
    )
