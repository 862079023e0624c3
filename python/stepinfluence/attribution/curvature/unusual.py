"""Mislabelled and unusual training examples: those that stand out by self-influence or leverage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from stepinfluence.attribution.curvature.choice import Choice, fitted
from stepinfluence.attribution.curvature.damping import Damping
from stepinfluence.attribution.curvature.stored import StoredFeatures
from stepinfluence.attribution.features import Features

By: TypeAlias = Literal["self-influence", "leverage"]
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Outlier:
    """A training example that stands out.

    Attributes:
        row, id: of the example.
        text: what a store holds of it, or None.
        score: self-influence or leverage, summed over steps and checkpoints.
        steps: ``(steps,)``: by the example's own loop steps; one entry where features are summed over steps.
        loss: at the last checkpoint.
    """

    row: int
    id: Hashable
    text: str | None
    score: float
    steps: npt.NDArray[np.float64]
    loss: float


def outliers(
    train: StoredFeatures | Features | Sequence[Features],
    k: int = 20,
    *,
    by: By = "self-influence",
    etas: float | Sequence[float] | None = None,
    curvature: Choice = "fisher",
    damping: Damping | None = None,
) -> list[Outlier]:
    """The k training examples that stand out most, and at which of their loop steps.

    Self-influence ``sum_k eta_k |g|^2`` is large for examples that training keeps pulling at: wrong labels and hard
    cases. Leverage ``sum_k eta_k g^T (F + lambda)^-1 g`` asks instead whether others explain an example: rare ones.

    Args:
        train: a store, or features, one per checkpoint; per step for scores by step. A store is read in bounded memory.
        k: how many.
        by: which of the two.
        etas: weight of each checkpoint; the store's, or 1, if not given.
        curvature, damping: of the leverage, as for :func:`stepinfluence.influence`.

    Raises:
        ValueError: an argument is none of those above. Errors of the fit pass through.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}; give a positive number of examples")
    if by not in ("self-influence", "leverage"):
        raise ValueError(f"by: got {by!r}; use 'self-influence' or 'leverage'")
    if by == "self-influence" and damping is not None:
        raise ValueError("damping: goes with by='leverage'")
    sides: StoredFeatures | list[Features]
    sides = train if isinstance(train, StoredFeatures) else [train] if isinstance(train, Features) else list(train)
    count = len(sides.checkpoints) if isinstance(sides, StoredFeatures) else len(sides)
    if not count:
        raise ValueError("train: got no features; give one per checkpoint")
    if etas is None:
        weights = [c.eta for c in sides.checkpoints] if isinstance(sides, StoredFeatures) else [1.0] * count
    else:
        weights = [float(etas)] * count if isinstance(etas, int | float) else [float(e) for e in etas]
    if len(weights) != count:
        raise ValueError(f"etas: got {len(weights)} for {count} checkpoints; give one per checkpoint")
    found = fitted(sides, curvature, damping) if by == "leverage" else None
    if by == "leverage" and found is None:
        raise ValueError("curvature: leverage needs one; use 'fisher' or 'block', or by='self-influence'")
    n = len(sides) if isinstance(sides, StoredFeatures) else len(sides[0])
    steps: list[torch.Tensor] = []
    for first in range(0, n, BLOCK_ROWS):
        rows = range(first, min(n, first + BLOCK_ROWS))
        total: torch.Tensor | None = None
        for checkpoint, eta in enumerate(weights):
            part = (
                sides.features(checkpoint, rows)
                if isinstance(sides, StoredFeatures)
                else sides[checkpoint].select(rows)
            )
            grad = part.summed().values.double()
            if found is not None:
                grad = found[checkpoint].solve(grad)
            values = part.values.double() if part.per_step else part.values.double().unsqueeze(1)
            term = eta * torch.einsum("nsd,nd->ns", values, grad)
            term[torch.isnan(part.losses).to(term.device)] = torch.nan
            total = term if total is None else total + term
        assert total is not None
        steps.append(total.cpu())
    by_step = torch.cat(steps)
    scores = by_step.sum(1).nan_to_num(-torch.inf)
    order = [int(row) for row in scores.argsort(descending=True, stable=True)[:k] if scores[row] > -torch.inf]
    return [_outlier(sides, row, float(scores[row]), by_step[row].numpy()) for row in order]


def _outlier(train: StoredFeatures | list[Features], row: int, score: float, steps: npt.NDArray[np.float64]) -> Outlier:
    if isinstance(train, StoredFeatures):
        info = train.row(row)
        return Outlier(
            row, info.id, info.text, score, steps, float(train.features(-1 + len(train.checkpoints), [row]).losses[0])
        )
    return Outlier(row, train[-1].ids[row], None, score, steps, float(train[-1].losses[row]))
