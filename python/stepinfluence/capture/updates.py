"""What an optimizer's step was made of, read right after it: learning rate, metric, and the gradients that it used."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from stepinfluence.arguments import one_of
from stepinfluence.attribution.features import weights_digest
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.inline import first_beyond, sketch_of_gradients
from stepinfluence.capture.recording.sketching import Sketching
from stepinfluence.errors import FeatureMismatchError, LayoutError

Metric: TypeAlias = Literal["sgd", "adam"]
METRICS = ("sgd", "adam")

CANCELLED = 1e-5
"""If examples' gradients add up to less than this share of their sizes, rounding decides what the sum is."""


@dataclass(frozen=True, eq=False)
class Part:
    """One batch of an update.

    Attributes:
        ids: of its examples.
        scores: ``(B, Q, steps)``, inner products with the queries; None where these have no metric yet.
        whole: ``(D,)``: the sum of its rows, which is the sketch of its gradient.
        sizes: the sum of its rows' norms, for each range of columns.
        tolerance: see :attr:`~stepinfluence.capture.inline.Inline.tolerance`.
    """

    ids: list[Hashable]
    scores: Tensor | None
    whole: Tensor
    sizes: Tensor
    tolerance: float


def last_finite(parts: Sequence[Part | None]) -> list[Part]:
    """The batches after the last whose gradients were not finite (None)."""
    found: list[Part] = []
    for part in parts:
        found = [] if part is None else [*found, part]
    return found


def gradients(targets: Sequence[Target]) -> list[tuple[Target, Tensor]]:
    """The gradients that parameters have."""
    return [(t, t.parameter.grad) for t in targets if t.parameter.grad is not None]


def waiting(targets: Sequence[Target]) -> bool:
    """Whether there are gradients that wait for an update."""
    return any(bool((gradient != 0).any()) for _, gradient in gradients(targets))


def read_factor(
    sketching: Sketching, parts: Sequence[Part], used: Sequence[tuple[Target, Tensor]], number: int
) -> float:
    """What the batches' gradients were multiplied by until update ``number`` used them.

    Raises:
        LayoutError: it used others (names the parameter), or they cancel.
    """
    whole = torch.stack([part.whole for part in parts]).sum(0)
    size = torch.stack([part.sizes for part in parts]).sum(0)
    found = sketch_of_gradients(sketching, used, whole)
    square = float(whole.double() @ whole.double())
    if bool(size.any()) and square <= (CANCELLED * float(size.sum())) ** 2:
        raise LayoutError(
            f"update {number}: the examples' gradients cancel, so that what they were multiplied by cannot be read; "
            "leave this batch out"
        )
    factor = float(found.double() @ whole.double()) / square if square else 0.0
    tolerance = max(part.tolerance for part in parts)
    other = first_beyond(sketching, found - factor * whole, abs(factor) * size, tolerance)
    if other is not None:
        raise LayoutError(
            f"{other}: the gradient that update {number} used is not that of the batches given to batch(...) times one "
            "number (a batch or a loss was left out, gradients were clipped by value, or averaged over processes); "
            "give all batches of an update, and scale gradients as a whole"
        )
    return factor


def learning_rate(optimizer: torch.optim.Optimizer, targets: Sequence[Target]) -> float:
    """The one learning rate of the body.

    Raises:
        ValueError: a body parameter is not the optimizer's, it maximizes, or there are several rates.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = set()
    for target in targets:
        group = group_of.get(id(target.parameter))
        if group is None:
            raise ValueError(
                f"optimizer: body parameter {target.name} is not one of its own; pass the optimizer that trains this "
                "model, or set requires_grad=False on the parameter"
            )
        if group.get("maximize"):
            raise ValueError(f"optimizer: it maximizes (parameter {target.name}); minimize the negative loss")
        rates.add(float(group["lr"]))
    if len(rates) > 1:
        raise ValueError(
            f"optimizer: the body's parameters have learning rates {', '.join(map(str, sorted(rates)))}; influence is "
            "a sum over all of them with one rate"
        )
    return rates.pop()


def metric_of(optimizer: torch.optim.Optimizer, metric: Metric | None) -> Metric:
    """The metric that is meant: the one that is named, or the optimizer's own.

    Raises:
        TypeError, ValueError: no optimizer, no such metric, or none is named and the optimizer's is not known.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}; pass the torch optimizer that trains the model")
    if metric is not None:
        one_of("metric", metric, METRICS)
        return metric
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return "adam"
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    raise ValueError(
        f"metric: that of {type(optimizer).__name__} is not known; pass 'adam' if it steps with Adam's second moments, "
        "or 'sgd' for plain inner products"
    )


def moment_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Where a training is: digests of all parameters, and of what the optimizer keeps of the gradients, by name."""
    named = sorted(model.named_parameters())
    kept = [
        (f"{name} {key}", value.detach())
        for name, parameter in named
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor) and value.dim()
    ]
    return {
        "weights": weights_digest([parameter.detach() for _, parameter in named]),
        "moments": " ".join(key for key, _ in kept) and weights_digest([value for _, value in kept]),
    }


def require_moment(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved_with: Mapping[str, str], updates: int
) -> None:
    """Raise unless model and optimizer are where they were when a state of a training was saved.

    Raises:
        FeatureMismatchError: they are not.
    """
    now = moment_of(model, optimizer)
    other = next((name for name in now if now[name] != saved_with[name]), None)
    if other is not None:
        what = {"weights": "weights than the model has", "moments": "moments than the optimizer has"}[other]
        raise FeatureMismatchError(
            f"state: it was saved after {updates} updates of other {what}; load the checkpoint of that moment, too, of "
            "model and optimizer"
        )
