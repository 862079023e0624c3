"""Metasmoothness: is the trained model a smooth function of the examples' weights?

Every score that predicts retraining takes the effect of an example for a derivative. Where training is chaotic there is
none to predict: finite differences of the weights change with their step, and a little further on. After Engstrom et
al. (arXiv 2503.13751), whose definition compares a forward difference with the one that begins where it ends; there of
the trained parameters, here of the queries' losses, which is what scores are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STEP = 0.05
"""With every weight moved by this much, up or down at random, two hundred examples move by as much as leaving out a
half does of one: the square root of n times it is 0.7."""


@dataclass(frozen=True)
class Smooth:
    """Agreement of finite differences of one training, each from -1 to 1; 1 where training is smooth, about 0 where it
    is chaotic.

    Attributes:
        across_steps: between central differences with a step and with twice the step.
        nearby: between differences on this side of the weights and on the other.
    """

    across_steps: float
    nearby: float


def smoothness(losses: Callable[[Array], Array], n_train: int, *, seed: int, step: float = STEP) -> Smooth:
    """Along one random direction of the weights, each example up or down.

    Args:
        losses: of the queries ``(n_query,)``, after training with weights ``(n_train,)``; called five times.
        n_train: examples.
        seed: of the direction.
        step: of the differences.
    """
    direction = np.random.default_rng([seed, 3]).choice([-1.0, 1.0], n_train)  # streams 0 to 2 are the draws'
    far, near, here, other_near, other_far = (losses(1 + k * step * direction) for k in (2, 1, 0, -1, -2))
    return Smooth(
        across_steps=sign_agreement((near - other_near) / (2 * step), (far - other_far) / (4 * step)),
        nearby=sign_agreement((far - here) / (2 * step), (here - other_far) / (2 * step)),
    )


def sign_agreement(a: Array, b: Array) -> float:
    """Mean over entries of whether signs agree (1) or not (-1), weighted by ``|a| + |b|``; NaN where all are 0."""
    weight = np.abs(a) + np.abs(b)
    total = float(weight.sum())
    return float((weight * np.sign(a) * np.sign(b)).sum() / total) if total > 0 else float("nan")
