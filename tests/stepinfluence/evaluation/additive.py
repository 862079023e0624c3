"""A problem whose retraining is arithmetic: every example lowers each query's loss by a known effect."""

from __future__ import annotations

import numpy as np
import torch
from stepinfluence.evaluation import Problem
from torch import Tensor, nn

EFFECTS = np.random.default_rng(7).normal(size=(20, 4))


class Losses(nn.Module):
    """Holds the loss of each query."""

    def __init__(self, losses: Tensor) -> None:
        super().__init__()
        self.losses = nn.Parameter(losses)


def additive(noise: float = 1.0, *, mislabelled: bool = True, fits: list[int] | None = None) -> Problem:
    """Loss of query q after training on rows: a level that the initialisation sets, minus the rows' effects on q.

    Args:
        noise: of the level, the same for all rows: what leaving out does is exact for each initialisation.
        mislabelled: whether the first four examples are said to be.
        fits: the seed of every training is appended.
    """

    def fit(rows: np.ndarray, seed: int) -> nn.Module:
        if fits is not None:
            fits.append(seed)
        level = noise * np.random.default_rng(seed).normal(size=4)
        return Losses(torch.from_numpy(level - EFFECTS[np.asarray(rows)].sum(0))).eval()

    wrong = np.zeros(20, bool)
    wrong[:4] = True
    return Problem(
        name="additive",
        train=list(range(20)),
        queries=list(range(4)),
        fit=fit,
        untrained=lambda seed: Losses(torch.zeros(4, dtype=torch.float64)),
        loss=lambda model, batch: model.losses[batch],
        body=lambda model: model,
        collate=lambda examples: torch.tensor(list(examples)),
        correct=lambda model, batch: model.losses[batch] < 1e6,
        mislabelled=wrong if mislabelled else None,
    )
