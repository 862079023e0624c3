"""Adding up influence over checkpoints so that one of them does not pass for all, and saying so where it does.

A plain sum weighs each checkpoint by its learning rate and by the size of its gradients. The latter differ by orders of
magnitude within one training run: a checkpoint next to a spike of the loss, or one that never saw inputs as long as the
query, can hold nearly all of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DOMINATES = 0.8
"""Share of the energy above which a checkpoint is named as dominating the sum."""

FIRST_ORDER = "first order, weighted by learning rate"
UNWEIGHTED = "first order, per unit of learning rate"
"""Units of a plain sum over checkpoints: a slope, with or without a learning rate. It is no amount of loss: it can
exceed the query's whole loss by orders of magnitude."""

SHARE = "% of the query's influence"
"""Unit of :func:`balanced`: of the absolute influence of all scored examples at all steps."""


@dataclass(frozen=True)
class Dominance:
    """A checkpoint that holds most of a query's influence.

    Attributes:
        name: of the checkpoint.
        index: its place among the checkpoints.
        share: of the SDI energy, over :data:`DOMINATES`.
    """

    name: str
    index: int
    share: float

    @property
    def sentence(self) -> str:
        """What it means, for people."""
        return (
            f"Checkpoint {self.name} holds {_percent(self.share)} of this query's SDI energy: a plain sum over "
            "checkpoints shows that one moment of the training, where gradients were largest (next to a spike of the "
            "loss, or before inputs like the query were learned), not what the others have in common. Look at "
            "checkpoints one by one."
        )


OF_AN_EXAMPLE = "first order, per unit of an example's weight in training"
"""Unit of SOURCE, which has learning rates and numbers of updates in it."""


def first_order_unit(etas: Sequence[float]) -> str:
    """Unit of a plain sum over checkpoints with these weights."""
    return UNWEIGHTED if all(eta == 1 for eta in etas) else FIRST_ORDER


def energy_shares(energy: ArrayLike) -> NDArray[np.float64]:
    """Each checkpoint's share of the energy.

    Args:
        energy: ``(K,)`` or ``(K, Q)``: absolute influence by checkpoint, summed over examples and steps.

    Returns:
        The same shape; columns sum to 1, or are 0 where there is no influence at all.

    Raises:
        ValueError: no checkpoint, or a value that is negative or not finite.
    """
    values = np.asarray(energy, dtype=np.float64)
    if values.ndim not in (1, 2) or not len(values):
        raise ValueError(f"energy: got shape {values.shape}; pass (checkpoints,) or (checkpoints, queries)")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("energy: holds negative or non-finite values; pass sums of absolute influence")
    largest = values.max(0)
    scaled = values / np.where(largest > 0, largest, 1.0)  # so that the sum cannot overflow
    total = scaled.sum(0)
    return np.asarray(scaled / np.where(total > 0, total, 1.0))


def dominating(energy: ArrayLike, names: Sequence[str]) -> Dominance | None:
    """The checkpoint that holds more than :data:`DOMINATES` of one query's energy; None if none does, or there is one.

    Args:
        energy: ``(K,)``.
        names: of the checkpoints.

    Raises:
        ValueError: as for :func:`energy_shares`, or the numbers of names and values differ.
    """
    shares = energy_shares(energy)
    if shares.shape != (len(names),):
        raise ValueError(f"names: got {len(names)} for energies of shape {shares.shape}; pass one per checkpoint")
    index = int(shares.argmax())
    if len(names) < 2 or shares[index] <= DOMINATES:
        return None
    return Dominance(str(names[index]), index, float(shares[index]))


def energy_of(parts: NDArray[Any]) -> NDArray[np.float64]:
    """Energy by checkpoint and query ``(K, Q)`` of influence ``(K, N, Q, steps)``."""
    return np.asarray(np.abs(parts).sum((1, 3), dtype=np.float64))


def equal_weights(energy: ArrayLike) -> NDArray[np.float64]:
    """Weights with which every checkpoint counts alike, and a query's absolute influence adds up to 100 at most.

    Args:
        energy: ``(K, Q)``, see :func:`energy_of`.

    Returns:
        ``(K, Q)``: 100 over the energy and over the number of checkpoints that have any; 0 for those without.
    """
    values = np.asarray(energy, dtype=np.float64)
    has = values > 0
    return np.asarray(np.where(has, 100 / np.where(has, values, 1.0), 0.0) / np.maximum(has.sum(0), 1))


def balanced(parts: NDArray[Any]) -> NDArray[np.float32]:
    """Influence with each checkpoint scaled to the same energy for each query, averaged over checkpoints.

    No checkpoint can own the result, whatever its gradients or its learning rate. Signs, and which example and which
    step leads within a checkpoint, are what they were.

    Args:
        parts: ``(K, N, Q, steps)``: influence of N examples on Q queries at each checkpoint.

    Returns:
        ``(N, Q, steps)`` in per cent of the query's influence (:data:`SHARE`).

    Raises:
        ValueError: another shape, or no checkpoint.
    """
    if parts.ndim != 4 or not len(parts):
        raise ValueError(f"parts: got shape {parts.shape}; pass (checkpoints, n_train, n_query, steps)")
    weights = equal_weights(energy_of(parts))
    total = np.zeros(parts.shape[1:], dtype=np.float64)
    for part, weight in zip(parts, weights, strict=True):
        total += part * weight[:, None]
    return total.astype(np.float32)


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return f"{min(100 * share, 99.9):.1f} %" if share < 1 else "100 %"
