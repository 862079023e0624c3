"""Methods that go through the training that led to a model: SOURCE by segments, metagradients update by update."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from stepinfluence.attribution.curvature import Progress, Segment, TrainingTime, Unrolled, segments_of
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.preconditioners import Elementwise
from stepinfluence.capture import attach
from stepinfluence.evaluation.metagradient import metagradients
from stepinfluence.evaluation.smoothness import smoothness
from stepinfluence.evaluation.trained import Scored, Trained, row_bytes
from stepinfluence.evaluation.training import CannotScore, checkpoint_updates

ASKED = 8
"""Queries that metagradients are computed for: the first ones of a problem."""

SMOOTH = 0.5
"""Metasmoothness below which a metagradient is not to be trusted."""

CHECKPOINTS = 5
"""That a run is taken to have kept: evenly spaced, the last one at the end."""


def times_of_run(trained: Trained, count: int = CHECKPOINTS) -> TrainingTime:
    """Training's length by each of a run's checkpoints, as ``damping="training"`` has it: read from what the
    checkpoints hold of the optimizer.

    Raises:
        CannotScore: the problem has no recipe, or its checkpoints do not say how long training went on.
        ValueError: fewer updates than checkpoints.
    """
    told = progress_of(trained, checkpoint_updates(trained.training.recipe.updates, count))
    try:
        return TrainingTime.of(told)
    except ValueError as error:
        raise CannotScore(f"{trained.problem.name}: {error}") from None


def source(trained: Trained, *, segments: int = 3, each: int = 2, sketch_size: int = 2048, adam: bool = True) -> Scored:
    """SOURCE by segments of equal length, with all updates known; arguments as for :func:`unrolled`.
    :func:`source_of_run` makes do with a run's checkpoints."""
    _ = trained.states  # their training is not counted
    began, sizes = time.process_time(), {"segments": segments, "each": each, "sketch_size": sketch_size}
    return _summed(*unrolled(trained, **sizes, adam=adam, per_step=False), began)


def source_of_run(trained: Trained, *, count: int = CHECKPOINTS, sketch_size: int = 2048) -> Scored:
    """SOURCE as ``curvature="source"`` has it of a run's store; arguments as for :func:`unrolled_by_run`."""
    _ = trained.states
    began = time.process_time()
    return _summed(*unrolled_by_run(trained, count=count, sketch_size=sketch_size, per_step=False), began)


def _summed(trains: Sequence[Features], asked: Sequence[Features], began: float) -> Scored:
    """Of summed features: one product for each checkpoint gives the sum over steps that is compared here."""
    scores = torch.stack([t.values @ q.values.T for t, q in zip(trains, asked, strict=True)]).sum(0)
    return Scored(scores.double().numpy(), None, time.process_time() - began, len(trains) * row_bytes(trains[0]))


def unrolled(
    trained: Trained,
    *,
    segments: int = 3,
    each: int = 2,
    sketch_size: int = 2048,
    adam: bool = True,
    per_step: bool = True,
) -> tuple[list[Features], list[Features]]:
    """Sketches of the train examples at checkpoints, and the queries' transformed by SOURCE for each of them
    (:class:`stepinfluence.curvature.Unrolled`).

    Args:
        trained: with a recipe.
        segments: of training.
        each: checkpoints of a segment, in the middle of equal parts of it.
        sketch_size: m.
        adam: whether features are taken under Adam's metric, the mean over training as it has to be one for all
            checkpoints (weighted by the learning rate); else plainly, with the metric's mean over parameters in the
            learning rate.
        per_step: whether the queries' are by step.

    Raises:
        ValueError: the problem has no recipe.
    """
    problem, training = trained.problem, trained.training
    recipe, count = training.recipe, segments * each
    ends = [round(recipe.updates * k / segments) for k in range(segments + 1)]
    taken = [round(recipe.updates * (k + 0.5) / count) for k in range(count)]
    metric = mean_metric(trained)
    scale = 1.0 if adam else float(torch.cat([root.sqrt.flatten() ** 2 for root in metric.values()]).mean())
    stretches = [
        Segment(
            tuple(range(k * each, (k + 1) * each)),
            scale * float(np.mean([recipe.rate(u) for u in range(first, last)])),
            last - first,
        )
        for k, (first, last) in enumerate(itertools.pairwise(ends))
    ]

    def features(update: int, side: str, *, per_step: bool) -> Features:
        model = training.model_at(trained.states[update])
        metric_of = metric if adam else None
        capture = attach(model, body=problem.body(model), sketch_size=sketch_size, preconditioner=metric_of)
        return capture.featurize(problem.batches(side), problem.loss, per_step=per_step, progress=False)

    trains = [features(update, "train", per_step=False) for update in taken]
    query = features(recipe.updates, "query", per_step=per_step)
    return trains, Unrolled.fit(trains, stretches).transform(query)


def unrolled_by_run(
    trained: Trained, *, count: int = CHECKPOINTS, sketch_size: int = 2048, per_step: bool = True
) -> tuple[list[Features], list[Features]]:
    """The same as :func:`unrolled`, as a run has it: plain features at evenly spaced checkpoints, the last one at the
    end, and segments that follow from them (:func:`stepinfluence.curvature.segments_of`).

    Args:
        trained: with a recipe.
        count: checkpoints.
        sketch_size: m.
        per_step: whether the queries' are by step.

    Raises:
        CannotScore: the problem has no recipe.
        ValueError: fewer updates than checkpoints.
    """
    problem, training = trained.problem, trained.training
    updates, trains = checkpoint_updates(training.recipe.updates, count), []
    for update in updates:
        model = training.model_at(trained.states[update])
        capture = attach(model, body=problem.body(model), sketch_size=sketch_size)
        trains.append(capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False))
    query = capture.featurize(problem.batches("query"), problem.loss, per_step=per_step, progress=False)
    return trains, Unrolled.fit(trains, segments_of(progress_of(trained, updates))).transform(query)


def mean_metric(trained: Trained) -> dict[str, Elementwise]:
    """Square roots of Adam's metric, which is averaged over all updates with their learning rates as weights."""
    training = trained.training
    recipe, total, weight = training.recipe, torch.zeros_like(trained.states[0].square), 0.0
    for state in trained.states[1:]:
        rate = recipe.rate(state.update - 1)
        total += rate / recipe.root(state.square, state.update)
        weight += rate
    return {name: Elementwise(part) for name, part in training.by_name((total / weight).sqrt()).items()}


def progress_of(trained: Trained, updates: Sequence[int]) -> list[Progress]:
    """What checkpoints after some updates tell of a training: as it is read from files
    (:func:`stepinfluence.curvature.training_time`).

    Raises:
        CannotScore: the problem has no recipe.
    """
    training, recipe = trained.training, trained.training.recipe
    capture = attach(trained.model, body=trained.problem.body(trained.model), sketch_size=16)
    found = []
    for update in updates:
        by_name = training.by_name(recipe.root(trained.states[update].square, update))
        mean = torch.cat([by_name[block.name].flatten() for block in capture.space().blocks]).double().mean()
        found.append(Progress(update, recipe.rate(update - 1), float(1 / mean), recipe.learning_rate))
    return found


def exact_metagradients(trained: Trained) -> Scored:
    """Exact metagradients (:mod:`.metagradient`) of the first :data:`ASKED` queries; NaN for others, which leaves them
    out of every figure, and for untrained weights. The sum over loop steps and all weights outside of the loop.

    Warns where training is not smooth in the weights of its examples: metagradients predict nothing then.
    """
    problem, training = trained.problem, trained.training
    scores = np.full((len(problem.train), len(problem.queries)), np.nan)
    asked = range(min(ASKED, len(problem.queries)))
    if trained.untrained:
        return Scored(scores, None, 0.0, 0)
    began = time.process_time()
    scores[:, list(asked)] = metagradients(training, asked, per_step=False).total.double().numpy()
    seconds = time.process_time() - began
    smooth = smoothness(
        lambda weights: problem.query_losses(training.model_at(training.final(torch.from_numpy(weights)))),
        len(problem.train),
        seed=trained.seed,
    )
    if smooth.across_steps < SMOOTH:
        warnings.warn(
            f"{problem.name}: metasmoothness {smooth.across_steps:.2f}, below {SMOOTH}: training is nearly chaotic in "
            "the weights of its examples, and its metagradient predicts little; train with a lower rate",
            stacklevel=2,
        )
    return Scored(scores, None, seconds, 0)
