r"""Damping chosen without retraining: the one under which the scores predict the training losses best.

Corrected influence is ridge regression in another guise. With each training loss ``y_j`` (less their mean) as a target
and features as inputs, the ridge prediction for example ``i`` is ``u_i = (1/N) sum_j <(F + lambda)^-1 g_i, g_j> y_j``:
the scores are its weights. How well it would predict examples that it has not seen is told, without leaving any out, by
generalised cross-validation (Golub, Heath & Wahba, 1979),

    V(lambda) = mean (y - u)^2 / (1 - 1.4 d / N)^2,         d = trace of F (F + lambda)^-1, the effective dimension,

where the factor 1.4 guards against too little damping, as plain cross-validation errs to that side (Kim & Gu, 2004).
The same fault shows as a second descent: with hardly any damping, the few examples with the largest gradients (wrong
labels) are fitted exactly, each by a direction of its own. So ``"auto"`` is the *first* minimum of V from the side of
much damping. Too little of it lets an example speak for itself only, too much leaves the largest gradients in charge.
Of blocks, each chooses for itself, and the median is used for all.

It takes two passes over the rows, their losses, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from stepinfluence.attribution.curvature.factors import Factor
from stepinfluence.attribution.curvature.length import TrainingTime
from stepinfluence.attribution.curvature.rows import FitRows

Damping: TypeAlias = float | Literal["auto", "training"] | TrainingTime
"""Relative to the largest eigenvalue; chosen by :func:`choose`; or by training's length, which a store knows
(``"training"``) or which is given (:class:`.TrainingTime`)."""

SMALLEST = 1e-12
"""Below, float64 has nothing left to divide by."""

GRID = tuple(10 ** (k / 4) for k in range(-24, 1))
"""Relative dampings that ``"auto"`` chooses from: 1e-6 to 1, four to a decade."""

CAUTION = 1.4
"""How much more than in plain cross-validation a dimension costs."""


def checked(damping: object) -> float | TrainingTime | None:
    """A relative damping as a number, or training's length; None for ``"auto"``.

    Raises:
        ValueError: it is none of these, or ``"training"``, which only a store can say.
    """
    if damping == "auto":
        return None
    if damping == "training":
        raise ValueError(
            "damping: 'training' needs to know how long training went on, and features in memory do not say; pass the "
            "store, or stepinfluence.curvature.TrainingTime(T)"
        )
    if isinstance(damping, TrainingTime):
        return damping.at(0, 1)
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not math.isfinite(damping):
        raise ValueError(
            f"damping: got {damping!r}; give a number relative to the largest eigenvalue, 'auto' or 'training'"
        )
    if damping < SMALLEST:
        raise ValueError(f"damping: got {damping!r}; give a positive number, at least {SMALLEST:g}, or 'auto'")
    return float(damping)


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        damping: relative.
        errors: V for each of :data:`GRID`, the median over blocks; infinite where the dimension is too large.
    """

    damping: float
    errors: tuple[float, ...]


def choose(rows: FitRows, factors: Sequence[Factor], columns: Sequence[slice]) -> Chosen:
    """The relative damping of :data:`GRID` at the first minimum of V from above.

    Raises:
        ValueError: the losses are not finite or all the same, so that there is nothing to predict.
    """
    target = rows.losses - rows.losses.mean()
    if not bool(torch.isfinite(target).all()):
        raise ValueError("damping: 'auto' predicts the train losses, and some are not finite; give a number")
    if rows.count < 2 or float(target.abs().max()) <= 1e-12 * float(rows.losses.abs().max()):
        raise ValueError("damping: 'auto' predicts the train losses, and these are all the same; give a number")
    device = factors[0].basis.device
    target, mean, first = target.to(device), torch.zeros(rows.space.width, dtype=torch.float64, device=device), 0
    for block in rows.blocks():
        mean += block.double().T @ target[first : first + len(block)] / rows.count
        first += len(block)
    used = [(factor, cut) for factor, cut in zip(factors, columns, strict=True) if factor.largest > 0]
    grid = torch.tensor(GRID, dtype=torch.float64, device=device)
    residual, leverage = (torch.zeros(len(used), len(grid), dtype=torch.float64, device=device) for _ in range(2))
    first = 0
    for block in rows.blocks():
        part = target[first : first + len(block), None]
        for k, (factor, cut) in enumerate(used):
            outside = 1 / (factor.rest + grid * factor.largest)
            gains = 1 / (factor.values[:, None] + grid * factor.largest) - outside
            some = block[:, cut].double()
            inside = some @ factor.basis.T
            fitted = inside @ (gains * (factor.basis @ mean[cut])[:, None]) + (some @ mean[cut])[:, None] * outside
            residual[k] += (part - fitted).square().sum(0)
            leverage[k] += inside.square().sum(0) @ gains + outside * some.square().sum()
        first += len(block)
    # The sum of all leverages over N is the dimension.
    left = 1 - CAUTION * leverage / rows.count**2
    errors = torch.where(left > 0, residual / rows.count / left.square(), torch.inf)
    places = sorted(first_minimum(curve) for curve in errors.tolist())
    return Chosen(GRID[places[len(places) // 2]], tuple(errors.sort(0).values[len(places) // 2].tolist()))


def first_minimum(errors: Sequence[float]) -> int:
    """The place of the last entry that is smaller than the one after it and not larger than the one before."""
    best = len(errors) - 1
    while best > 0 and errors[best - 1] <= errors[best]:
        best -= 1
    return best
