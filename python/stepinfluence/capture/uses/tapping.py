"""What the forward passes of a capture have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stepinfluence.capture.body.sources import ModelTensors
from stepinfluence.capture.body.steps import StepTracker
from stepinfluence.capture.owners import Memories
from stepinfluence.errors import UnsupportedUseError


@dataclass(frozen=True)
class Tapping:
    """What all forward passes of a capture have in common.

    Attributes:
        tensors: of the model.
        steps: counts the loop steps.
        rules: how uses are tapped, by torch function.
        expand: for calls that give a batch-free tensor a row for each example.
        otherwise: for operations without a rule.
        anchor: a leaf that taps alone depend on.
        outside: ``"error"`` or ``"ignore"``: what becomes of uses outside the loop.
        batch_dim: the dimension that holds the examples.
        memories: of what torch calls do to owners.
    """

    tensors: ModelTensors
    steps: StepTracker
    rules: dict[Any, Callable[..., Any]]
    expand: Callable[..., Any]
    otherwise: Callable[..., Any]
    anchor: Tensor
    outside: str
    batch_dim: int
    memories: Memories = field(default_factory=Memories)


def nested(where: str) -> UnsupportedUseError:
    """The error for tensors whose examples have lengths of their own."""
    return UnsupportedUseError(
        f"model: a nested (jagged) tensor, {where}, cannot be followed; pass padded tensors with a mask"
    )
