"""LDS of curvature-corrected SDI for a grid of dampings, for those that are chosen without retraining, and of SOURCE.

    python -m bench.dampings adder --keep

On the models that ``python -m bench.evaluate`` has trained (``--folder``); what is missing is trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from stepinfluence import attach
from stepinfluence.attribution.curvature import BlockFisher, Fisher, TrainingTime
from stepinfluence.attribution.preconditioners import Elementwise
from stepinfluence.evaluation import linear_datamodeling_score
from stepinfluence.evaluation.along_training import mean_metric, source_of_run, times_of_run
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.retraining import Retrainings, draws, training_seed
from stepinfluence.evaluation.trained import Scored, Trained

from bench.of_problem import begun, parser_of
from bench.provenance import write

GRID = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Dampings relative to the largest eigenvalue."""


def main() -> None:
    """One problem."""
    parser = parser_of(__doc__, PROBLEMS, folder="evaluate")
    parser.add_argument("--subsets", type=int, default=8, help="halves of a seed (8)")
    parser.add_argument("--repeats", type=int, default=2, help="initialisations of every retraining (2)")
    args, came_from = begun(parser, lambda known: f"dampings-{known.problem}", "evaluate")
    found = by_damping(make_problem(args.problem), args.folder, range(args.seeds), args.subsets, args.repeats)
    for name, values in found.items():
        print(f"{name:20} {np.mean(values):.3f}  {' '.join(f'{value:.3f}' for value in values)}")
    settings = {"seeds": args.seeds, "subsets": args.subsets, "repeats": args.repeats}
    write(args.json, came_from, {"settings": settings, "lds": found})


def by_damping(
    problem: Problem, folder: Path, seeds: Sequence[int], subsets: int, repeats: int
) -> dict[str, list[float]]:
    """LDS for each seed of SDI (m = 2048), plain and corrected: with every damping of :data:`GRID`, with the one that
    ``"auto"`` chooses, and with those that training's length says: as a run reads it from checkpoints (``training``),
    and by all updates and the plain mean of Adam's multipliers (``training time``); and of these checkpoints' SOURCE.
    """
    trained = Retrainings(problem, folder)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        drawn, model = draws(problem, seed, subsets=subsets, left_out=0), trained.model(seed)
        halves = [
            [trained.outcome(seed, np.flatnonzero(half), repeat=r, what="half").losses for half in drawn.halves]
            for r in range(repeats)
        ]
        given = Trained(problem, model, training_seed(seed, 0))
        length = TrainingTime(times_of_run(given).times[-1])
        capture = attach(model, body=problem.body(model), sketch_size=2048)
        train, query = problem.features(capture, "train"), problem.features(capture, "query")
        scores = {"none": (train.values @ query.values.T).double().numpy()}
        for kind in (Fisher, BlockFisher):
            auto = kind.fit(train, damping="auto")
            dampings = {"auto": auto, **{f"{damping:.0e}": auto.with_damping(damping) for damping in GRID}}
            dampings["training"] = auto.with_damping(length)
            for name, one in dampings.items():
                values = train.values @ one.transform(query).values.T
                scores[f"{kind.kind}, {name}"] = values.double().numpy()
        scores["fisher, training time"] = by_training_time(given).scores
        scores["source of a run"] = source_of_run(given).scores
        for name, values in scores.items():
            lds = linear_datamodeling_score(values, np.mean(halves, axis=0), drawn.halves)
            found.setdefault(name, []).append(float(np.nanmean(lds)))
    return found


def time_by_all_updates(trained: Trained, metric: Mapping[str, Elementwise], names: Iterable[str]) -> float:
    """The learning rates of all updates, added up, times the mean of :func:`.mean_metric`'s squares over parameters."""
    scale = float(torch.cat([metric[name].sqrt.flatten() ** 2 for name in names]).mean())
    recipe = trained.training.recipe
    return scale * sum(recipe.rate(update) for update in range(recipe.updates))


def by_training_time(trained: Trained, *, sketch_size: int = 2048) -> Scored:
    """SDI corrected by the Fisher with the damping that training's length says: ``1 / T``, where T adds up the learning
    rates of all updates, each times the mean over the body's parameters of what Adam multiplies a gradient with.

    Gradient descent for a time T leaves of a direction with curvature h about what ridge regression with the penalty
    ``1 / T`` would (early stopping; Ali et al., arXiv 1810.10082): directions with ``h T << 1`` have hardly moved, and
    the inverse of their curvature says nothing of what training did. No constant is to be chosen.

    It takes all updates, and the plain mean of the multipliers, which the root epsilon of these recipes allows;
    :func:`~stepinfluence.evaluation.along_training.times_of_run` takes checkpoints, and a mean that any Adam allows.

    Raises:
        CannotScore: the problem has no recipe.
    """
    problem, model = trained.problem, trained.model
    metric = mean_metric(trained)  # its training is not counted
    began = time.process_time()
    capture = attach(model, body=problem.body(model), sketch_size=sketch_size)
    train, query = problem.features(capture, "train"), problem.features(capture, "query")
    total = time_by_all_updates(trained, metric, [block.name for block in train.space.blocks])
    fisher = Fisher.fit(train, damping=1.0)
    damped = fisher.with_damping(1 / (total * fisher.factors[0].largest))
    return Scored.of(train, damped.transform(query), began=began)


if __name__ == "__main__":
    main()
