"""The counterfactual: take examples away, train again, and see what becomes of the queries' losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reproduce.arrays import Integers
from reproduce.planted.config import Config
from reproduce.planted.planting import Planted
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.training import answer_loss, losses_of, train

Scores = npt.NDArray[np.float32]


def most_helpful(scores: Scores, count: int) -> Integers:
    """Rows with the largest scores ``(N,)``, best first."""
    return np.argsort(-scores, kind="stable")[:count]


def most_harmful_each(scores: Scores, count: int) -> Integers:
    """Rows to remove for a group of queries: every query's most harmful rows in turn, until there are ``count``.

    Args:
        scores: ``(N, queries)``.
        count: how many rows.
    """
    ranked = np.argsort(scores, axis=0, kind="stable").ravel()  # everyone's worst, then everyone's second worst, …
    first = np.sort(np.unique(ranked, return_index=True)[1])
    return ranked[first[:count]]


def counterfactuals(task: StepTask, planted: Planted, scores: Scores, config: Config) -> dict[str, Any]:
    """Retrain without chosen examples and without random ones, from the same weights and in the same manner.

    Every removal takes ``config.removed`` examples. Retraining ``s`` has seed ``config.seed + 1 + s`` in every arm, so
    that arms differ in their training sets only (and in what order that implies).

    Args:
        task: of the model.
        planted: training set and queries.
        scores: influence ``(n_train, n_query)``.
        config: sizes.

    Returns:
        Losses of all queries ``(seeds, n_query)``, in nats: ``random``, ``rule`` and ``plain`` (without what is most
        helpful for these queries together), ``poisoned`` (without what is most harmful for each of them); ``found``,
        the share of the planted examples of the rule and of the poison among those removed.
    """
    rng = np.random.default_rng((config.seed, 3))
    columns = {kind: planted.of_kind(kind) for kind in ("rule", "poisoned", "plain")}
    removals = {kind: most_helpful(scores[:, columns[kind]].mean(1), config.removed) for kind in ("rule", "plain")}
    removals["poisoned"] = most_harmful_each(scores[:, columns["poisoned"]], config.removed)
    losses: dict[str, list[npt.NDArray[np.float32]]] = {arm: [] for arm in ("random", *removals)}
    for repeat in range(config.retrain_seeds):
        random = rng.choice(len(planted.train), config.removed, replace=False)
        for arm, rows in (("random", random), *removals.items()):
            losses[arm].append(_without(task, planted, rows, config, repeat))
    wanted = {k: np.flatnonzero(np.any(planted.critical[:, columns[k]], axis=1)) for k in ("rule", "poisoned")}
    return {
        **{arm: np.stack(values) for arm, values in losses.items()},
        "found": {kind: float(np.isin(rows, removals[kind]).mean()) for kind, rows in wanted.items()},
    }


def _without(task: StepTask, planted: Planted, rows: Integers, config: Config, repeat: int) -> npt.NDArray[np.float32]:
    kept = np.setdiff1d(np.arange(len(planted.train)), rows)
    model, _ = train(
        task, planted.train[torch.from_numpy(kept)], config, loss=answer_loss(task), seed=config.seed + 1 + repeat
    )
    return losses_of(model, task, planted.queries).numpy()
