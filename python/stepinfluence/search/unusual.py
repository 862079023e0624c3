"""Mislabelled and unusual training examples: those that stand out by self-influence or leverage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from stepinfluence.attribution.curvature import Choice, Damping
from stepinfluence.search.question import corrections, resolved_etas
from stepinfluence.search.sources import Rows, as_source, lengths_of

By: TypeAlias = Literal["self-influence", "leverage"]
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Outlier:
    """A training example that stands out.

    Attributes:
        row, id: of the example.
        text: what a store holds of it, or None.
        score: self-influence or leverage, summed over steps and checkpoints.
        steps: ``(steps,)``: by the loop steps that the example took; one entry where features are summed over steps.
        loss: at the last checkpoint.
    """

    row: int
    id: Hashable
    text: str | None
    score: float
    steps: npt.NDArray[np.float64]
    loss: float


def outliers(
    train: Rows,
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
        train: a store, or features, one per checkpoint; per step for scores by step. A store is read in bounded
            memory, and features of several checkpoints are matched by ids.
        k: how many.
        by: which of the two.
        etas: weight of each checkpoint; the store's, or 1, if not given.
        curvature, damping: of the leverage, as for :func:`stepinfluence.influence`.

    Raises:
        ValueError: an argument is none of those above. Errors of the fit, and of a source of rows, pass through.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}; give a positive number of examples")
    if by not in ("self-influence", "leverage"):
        raise ValueError(f"by: got {by!r}; use 'self-influence' or 'leverage'")
    if by == "self-influence" and damping is not None:
        raise ValueError("damping: goes with by='leverage'")
    source = as_source("train", train)
    weights = resolved_etas(source, etas)
    found = corrections(train, curvature, damping) if by == "leverage" else None
    if by == "leverage" and not isinstance(found, list):
        raise ValueError("curvature: leverage needs a matrix; use 'fisher' or 'block', or by='self-influence'")
    steps: list[torch.Tensor] = []
    for first in range(0, len(source), BLOCK_ROWS):
        rows = range(first, min(len(source), first + BLOCK_ROWS))
        total = torch.zeros(())
        for checkpoint, eta in enumerate(weights):
            values = source.take(checkpoint, rows).double()
            values = values if source.per_step else values.unsqueeze(1)
            grad = values.sum(1)
            grad = found[checkpoint].solve(grad) if isinstance(found, list) else grad
            total = total.to(values) + eta * torch.einsum("nsd,nd->ns", values, grad)
        steps.append(total.cpu())
    if not steps:
        return []
    by_step = torch.cat(steps)
    by_step[torch.from_numpy(~source.valid)] = torch.nan
    scores, losses = by_step.sum(1).nan_to_num(-torch.inf), source.losses(len(weights) - 1)
    lengths = lengths_of(source, range(len(weights)))
    taken = torch.full((len(source),), by_step.shape[1]) if lengths is None else lengths.clamp(min=1)
    order = [int(row) for row in scores.argsort(descending=True, stable=True)[:k] if scores[row] > -torch.inf]
    return [
        Outlier(
            row,
            source.id_of(row),
            source.text_of(row),
            float(scores[row]),
            by_step[row, : int(taken[row])].numpy(),
            float(losses[row]),
        )
        for row in order
    ]
