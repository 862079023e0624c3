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
from stepinfluence.evaluation.trained import Scored, Trained, row_bytes

Method: TypeAlias = Callable[[Trained], Scored]


def sdi(
    trained: Trained,
    *,
    sketch_size: int | None = 2048,
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
) -> Scored:
    """Step-decomposed influence, summed over steps for comparison with the others.

    Args:
        trained: what is asked about.
        sketch_size: m; None for exact gradients of the body: TracIn.
        curvature, damping, normalize: as for :func:`stepinfluence.influence`. Suspicion is the plain self-influence,
            and None for unit-norm rows.

    Raises:
        CannotScore: ``damping="training"``, and training does not tell its length.
    """
    problem, model = trained.problem, trained.model
    if damping == "training":  # what training left behind is not counted
        damping = TrainingTime(times_of_run(trained).times[-1])
    began, body = time.process_time(), problem.body(model)
    capture: Capture | ExactCapture = (
        ExactCapture(model, body=body) if sketch_size is None else attach(model, body=body, sketch_size=sketch_size)
    )
    train, query = problem.features(capture, "train"), problem.features(capture, "query")
    (rows,), (asked,) = corrected([train], [query], curvature=curvature, damping=damping, normalize=normalize)
    suspicion = self_influence(train).double().numpy() if normalize is None else None
    return Scored.of(rows, asked, began=began, suspicion=suspicion)


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
        train, query = problem.features(capture, "train"), problem.features(capture, "query")
        (rows,), (asked,) = corrected([train], [query], curvature=curvature, damping=damped)
        weight = checkpoint.learning_rate * checkpoint.updates
        scores += weight * (rows.values @ asked.values.T).double().numpy()
        suspicion += weight * self_influence(train).double().numpy()
        width += row_bytes(train)
    return Scored(scores, suspicion, time.process_time() - began, width)


METAGRADIENTS = f"metagradients, {ASKED} queries"

METHODS: dict[str, Method] = {
    "SDI, m=2048": sdi,
    "SDI, m=256": partial(sdi, sketch_size=256),
    "SDI-Fisher, auto": partial(sdi, curvature="fisher"),
    "SDI-Fisher, auto, m=256": partial(sdi, curvature="fisher", sketch_size=256),
    "SDI-Fisher, auto, m=32": partial(sdi, curvature="fisher", sketch_size=32),
    "SDI-Fisher, training": partial(sdi, curvature="fisher", damping="training"),
    "SDI-Fisher blocks, auto": partial(sdi, curvature="block"),
    "SDI-Fisher of unit rows, 1e-2": partial(sdi, curvature="fisher", damping=1e-2, normalize="train"),
    "SDI, cosine": partial(sdi, normalize="both"),
    "SDI, 5 checkpoints": over_checkpoints,
    "SDI-Fisher, auto, 5 checkpoints": partial(over_checkpoints, curvature="fisher"),
    "SDI-Fisher, training, 5 checkpoints": partial(over_checkpoints, curvature="fisher", damping="training"),
    "SOURCE of a run": source_of_run,
    "SOURCE, Adam's metric": source,
    METAGRADIENTS: exact_metagradients,
    "TracIn, exact": partial(sdi, sketch_size=None),
    "grad-cosine": partial(sdi, sketch_size=None, normalize="both"),
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
