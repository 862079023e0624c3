r"""Training's length: the damping of a training that has ended, where it is known how long it went on.

Training for a time T leaves of a direction with curvature h about what ridge regression with the penalty ``1 / T``
would (early stopping; Ali et al., arXiv 1810.10082): a direction with ``h T << 1`` has hardly moved, and dividing by
its small curvature claims a displacement that training never made. So ``lambda = 1 / T``, absolute, with

    T = sum over updates of  (learning rate) * (what the optimizer multiplies a gradient with),

where the second number is 1 for SGD. Adam multiplies every entry with a number of its own, ``1 / (sqrt(v) + eps)``:
taken is one over the mean of ``sqrt(v) + eps`` over the body's entries. (The plain mean of the multipliers belongs to
the entries that have no gradient but rounding, such as the biases of attention's keys: they are multiplied with up to
``1 / eps``, and go nowhere all the same.) Features under the optimizer's metric have the multiplier in them: 1 again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepinfluence.arguments import positive_float, positive_int

SAME_RATE = 1e-6
"""Learning rates that differ by less, relatively, are the same."""


@dataclass(frozen=True)
class Progress:
    """How far a training had come at a checkpoint.

    Attributes:
        updates: that the optimizer had made by then.
        rate: learning rate of the last of them; of SGD with momentum mu, divided by ``1 - mu``. It may be 0.
        gain: what the optimizer multiplied gradients with; 1 for SGD, and for features under the optimizer's metric.
        first_rate: learning rate that training began with (a scheduler's ``initial_lr``); None where that is not known.

    Raises:
        TypeError, ValueError: a number that is not positive and finite.
    """

    updates: int
    rate: float
    gain: float = 1.0
    first_rate: float | None = None

    def __post_init__(self) -> None:
        positive_int("updates", self.updates)
        positive_float("gain", self.gain)
        for name, rate in (("rate", self.rate), ("first_rate", self.first_rate)):
            if rate is not None and rate != 0:
                positive_float(name, rate)


@dataclass(frozen=True)
class TrainingTime:
    """Training's length as a damping: ``lambda = 1 / T``, whatever the largest eigenvalue.

    Attributes:
        times: T by each checkpoint; from the beginning of training, in learning rates times what the optimizer
            multiplies a gradient with. One number may be given as it is: ``TrainingTime(30.0)``.

    Raises:
        TypeError, ValueError: none, or a number that is not positive.
    """

    times: tuple[float, ...]

    def __init__(self, times: float | Sequence[float]) -> None:
        given = [times] if isinstance(times, int | float) else list(times)
        if not given:
            raise ValueError("times: got none; give training's length T, or one for each checkpoint")
        object.__setattr__(self, "times", tuple(positive_float("times", one) for one in given))

    @classmethod
    def of(cls, progress: Sequence[Progress]) -> TrainingTime:
        """From what is known at checkpoints of one training, in its order.

        Between two checkpoints, the learning rate times the gain is taken to go from the one's to the other's in a
        straight line, and before the first from ``first_rate`` (constant where that is None).

        Raises:
            ValueError: no checkpoint, updates that do not grow, learning rates that are all 0, or too little known of
                the learning rate before the first checkpoint: more than half of training lies there, and neither a
                ``first_rate`` nor equal rates at several checkpoints say what it was.
        """
        given = list(progress)
        if not given:
            raise ValueError("progress: got no checkpoint; give at least one")
        updates = [one.updates for one in given]
        if any(later <= earlier for earlier, later in itertools.pairwise(updates)):
            raise ValueError(
                f"checkpoints: after {', '.join(map(str, updates))} updates, which do not grow: these are not one "
                "training's in its order; name them so, or give a damping as a number"
            )
        first = given[0]
        rates = [one.rate for one in given]
        constant = len(given) > 1 and max(rates) - min(rates) <= SAME_RATE * max(rates)
        if first.first_rate is None and not constant and (len(given) == 1 or 2 * updates[0] > updates[-1]):
            raise ValueError(
                f"checkpoints: nothing says which learning rates the first {updates[0]} of {updates[-1]} updates had "
                "(no initial_lr of a scheduler, no earlier checkpoint); name earlier checkpoints too, or give a "
                "damping as a number"
            )
        before = (first.rate if first.first_rate is None else first.first_rate) * first.gain
        total, done, found = 0.0, 0, []
        for one in given:
            here = one.rate * one.gain
            total += (one.updates - done) * (before + here) / 2
            before, done = here, one.updates
            found.append(total)
        if found[0] <= 0:
            raise ValueError("checkpoints: their learning rates are 0; give a damping as a number")
        return cls(found)

    def at(self, checkpoint: int, count: int) -> TrainingTime:
        """By one of ``count`` checkpoints.

        Raises:
            ValueError: these are not for so many.
        """
        if len(self.times) != count:
            raise ValueError(
                f"damping: training's length by {len(self.times)} checkpoints, for features of {count}; give one each"
            )
        return TrainingTime(self.times[checkpoint])


def known(
    checkpoints: Sequence[tuple[str, Progress | str]],
    *,
    asked: str = "damping: 'training'",
    instead: str = "'auto' or a number",
) -> list[Progress]:
    """How far training had come at some checkpoints, of which name and progress are given, or why that is not known:
    enough for :meth:`TrainingTime.of`.

    Args:
        asked: what needs it, in messages.
        instead: what may be given instead.

    Raises:
        ValueError: it is not known at one of them (says why), or as for :meth:`TrainingTime.of`.
    """
    found = []
    for name, progress in checkpoints:
        if not isinstance(progress, Progress):
            why = progress or "the store was written by an earlier version, which did not record it; featurize again"
            raise ValueError(
                f"{asked} needs training's length, which is not known at checkpoint {name!r}: {why}; or give {instead}"
            )
        found.append(progress)
    try:
        TrainingTime.of(found)
    except ValueError as error:
        raise ValueError(f"{asked} needs training's length: {error}") from None
    return found


def plain(progress: Progress | str) -> dict[str, float | None] | str:
    """As JSON values."""
    return progress if isinstance(progress, str) else dict(vars(progress))


def parsed(value: object) -> Progress | str:
    """The inverse of :func:`plain`.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise TypeError("progress: neither numbers nor words")
    numbers = [value["rate"], value["gain"], value["first_rate"]]
    if not all(isinstance(one, float) and math.isfinite(one) for one in numbers if one is not None):
        raise TypeError(f"progress: got {numbers}")
    return Progress(value["updates"], *numbers)
