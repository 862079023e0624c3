"""Errors for uses of parameters that cannot be captured."""

from __future__ import annotations

from stepinfluence.errors import BodyError, UnsupportedUseError


def used_outside(name: str, operation: str) -> BodyError:
    """The error for a body parameter that an operation uses outside the loop."""
    return BodyError(
        f"{name}: used outside the loop body (by {operation}); pass outside='ignore' to leave such uses out of the "
        "influence, or make their module part of the body"
    )


def inner_gradients(operation: str) -> UnsupportedUseError:
    """The error for a model that takes gradients through the loop in its forward pass."""
    return UnsupportedUseError(
        f"model: takes gradients through the loop body in its forward pass ({operation}); what the body's parameters "
        "do to those gradients cannot be captured, use ExactCapture"
    )


def constants_only(name: str) -> UnsupportedUseError:
    """The error for a loop that was run on what counts for constants."""
    return UnsupportedUseError(
        f"{name}: the loop was run on tensors that no tensor of the batch went into; such as a pass makes itself "
        "(torch.tensor, torch.zeros) count for constants unless they have a row for each example: make them in the "
        "loader, or from the batch's tensors (torch.zeros_like)"
    )
