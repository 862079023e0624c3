"""The methods that are compared: ours, and what people use otherwise."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np

from stepinfluence.attribution.curvature import Choice, Damping, Normalize, TrainingTime, corrected
from stepinfluence.attribution.curvature.choice import unit_norm
from stepinfluence.attribution.scoring import self_influence
from stepinfluence.capture import Capture, ExactCapture, attach
from stepinfluence.evaluation.along_training import (
    ASKED,
    CHECKPOINTS,
    exact_metagradients,
    source,
    source_of_run,
    times_of_run,
)
from stepinfluence.evaluation.peers import ek_fac, trak
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.trained import Scored, Trained

Method: TypeAlias = Callable[[Trained], Scored]


def _influence(problem: Problem, capture: Capture | ExactCapture, *, cosine: bool = False) -> Scored:
    began = time.process_time()
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, per_step=False, progress=False)
    if cosine:
        train, query = unit_norm(train), unit_norm(query)
    # Summed features: one product gives the sum over steps that is compared here.
    scores = (train.values @ query.values.T).double().numpy()
    suspicion = None if cosine else self_influence(train).double().numpy()
    width = train.values.shape[1] * train.values.element_size()
    return Scored(scores, suspicion, time.process_time() - began, width)


def corrected_sdi(
    trained: Trained,
    *,
    sketch_size: int = 2048,
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
) -> Scored:
    """SDI with the query's features times ``(F + lambda)^-1`` of the train features; arguments as for
    :func:`stepinfluence.influence`. Suspicion is the plain self-influence, and None for unit-norm rows.

    Raises:
        CannotScore: ``damping="training"``, and training does not tell its length.
    """
    problem, model = trained.problem, trained.model
    if damping == "training":  # what training left behind is not counted
        damping = TrainingTime(times_of_run(trained).times[-1])
    began = time.process_time()
    capture = attach(model, body=problem.body(model), sketch_size=sketch_size)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, per_step=False, progress=False)
    (rows,), (asked,) = corrected([train], [query], curvature=curvature, damping=damping, normalize=normalize)
    scores = (rows.values @ asked.values.T).double().numpy()
    suspicion = self_influence(train).double().numpy() if normalize is None else None
    width = train.values.shape[1] * train.values.element_size()
    return Scored(scores, suspicion, time.process_time() - began, width)


def sdi(trained: Trained) -> Scored:
    """Step-decomposed influence from sketches (m = 2048), summed over steps for comparison with the others."""
    return _influence(
        trained.problem, attach(trained.model, body=trained.problem.body(trained.model), sketch_size=2048)
    )


def sdi_small(trained: Trained) -> Scored:
    """The same at m = 256."""
    return _influence(trained.problem, attach(trained.model, body=trained.problem.body(trained.model), sketch_size=256))


def tracin(trained: Trained) -> Scored:
    """TracIn from exact per-example gradients of the body."""
    return _influence(trained.problem, ExactCapture(trained.model, body=trained.problem.body(trained.model)))


def grad_cosine(trained: Trained) -> Scored:
    """Cosine of exact gradients: TracIn without the gradients' sizes."""
    return _influence(
        trained.problem, ExactCapture(trained.model, body=trained.problem.body(trained.model)), cosine=True
    )


def random_scores(trained: Trained) -> Scored:
    """Chance: other draws for other weights, as a method that is fixed would be a method."""
    weights = hashlib.sha256(next(trained.model.parameters()).detach().cpu().numpy().tobytes()).digest()
    rng = np.random.default_rng(list(weights))
    draws = rng.standard_normal((len(trained.problem.train), len(trained.problem.queries) + 1))
    return Scored(draws[:, 1:], draws[:, 0], 0.0, 0)


def over_checkpoints(
    trained: Trained, *, curvature: Choice = "none", damping: Damping | None = None, count: int = CHECKPOINTS
) -> Scored:
    """Scores at evenly spaced checkpoints, each with a curvature of its own, summed with the learning rates of the
    updates before each. Seconds do not count the training that leaves the checkpoints behind.

    Args:
        trained: with a recipe.
        curvature: of each checkpoint.
        damping: of it; with ``"training"`` each has that of training up to it.
        count: checkpoints.

    Raises:
        CannotScore: the problem has no recipe, or ``damping="training"`` and training does not tell its length.
    """
    problem, checkpoints = trained.problem, trained.checkpoints(count)
    dampings: list[Damping | None] = [damping] * count
    if damping == "training":
        dampings = [TrainingTime(one) for one in times_of_run(trained, count).times]
    began = time.process_time()
    scores = np.zeros((len(problem.train), len(problem.queries)))
    suspicion, width = np.zeros(len(problem.train)), 0
    for checkpoint, damped in zip(checkpoints, dampings, strict=True):
        capture = attach(checkpoint.model, body=problem.body(checkpoint.model), sketch_size=2048)
        train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
        query = capture.featurize(problem.batches("query"), problem.loss, per_step=False, progress=False)
        (rows,), (asked,) = corrected([train], [query], curvature=curvature, damping=damped)
        weight = checkpoint.learning_rate * checkpoint.updates
        scores += weight * (rows.values @ asked.values.T).double().numpy()
        suspicion += weight * self_influence(train).double().numpy()
        width += train.values.shape[1] * train.values.element_size()
    return Scored(scores, suspicion, time.process_time() - began, width)


METAGRADIENTS = f"metagradients, {ASKED} queries"

METHODS: dict[str, Method] = {
    "SDI, m=2048": sdi,
    "SDI, m=256": sdi_small,
    "SDI-Fisher, auto": partial(corrected_sdi, curvature="fisher"),
    "SDI-Fisher, auto, m=256": partial(corrected_sdi, curvature="fisher", sketch_size=256),
    "SDI-Fisher, auto, m=32": partial(corrected_sdi, curvature="fisher", sketch_size=32),
    "SDI-Fisher, training": partial(corrected_sdi, curvature="fisher", damping="training"),
    "SDI-Fisher blocks, auto": partial(corrected_sdi, curvature="block"),
    "SDI-Fisher of unit rows, 1e-2": partial(corrected_sdi, curvature="fisher", damping=1e-2, normalize="train"),
    "SDI, cosine": partial(corrected_sdi, normalize="both"),
    "SDI, 5 checkpoints": over_checkpoints,
    "SDI-Fisher, auto, 5 checkpoints": partial(over_checkpoints, curvature="fisher"),
    "SDI-Fisher, training, 5 checkpoints": partial(over_checkpoints, curvature="fisher", damping="training"),
    "SOURCE of a run": source_of_run,
    "SOURCE, Adam's metric": source,
    METAGRADIENTS: exact_metagradients,
    "TracIn, exact": tracin,
    "grad-cosine": grad_cosine,
    "TRAK": trak,
    "TRAK, 5 models": partial(trak, models=5),
    "EK-FAC": ek_fac,
    "random": random_scores,
}

PACKAGES = {"TRAK": "trak", "TRAK, 5 models": "trak", "EK-FAC": "kronfluence"}
"""What a method needs to be installed."""


def available() -> dict[str, Method]:
    """Those that this machine can run: TRAK needs the package ``traker``, EK-FAC ``kronfluence``."""
    missing = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    return {name: method for name, method in METHODS.items() if name not in missing}
