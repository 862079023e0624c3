"""Trajectories of examples that took different numbers of loop steps, brought onto one axis to be compared.

A step index says how often the body was entered before, not how far an example has come. The third of four steps and
the third of twelve are the same place from the start, different ones from the end, and different shares of the way.
Which of the three is meant is for whoever compares to say (docs/depth.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepinfluence.arguments import one_of, positive_int
from stepinfluence.attribution.features import Features

Align: TypeAlias = Literal["start", "end", "share"]
ALIGNS: tuple[str, ...] = get_args(Align)

AXES = {"start": "loop step", "end": "loop step, from the last (0)", "share": "share of the loop steps, %"}
"""What the axis of an alignment is called in figures."""


def lengths_of(features: Sequence[Features]) -> Tensor | None:
    """``(N,)`` int64: the last step (1-based) that an example's loss depends on, at any of the checkpoints.

    Args:
        features: of the same examples in the same order, one for each checkpoint.

    Returns:
        None where they are summed over steps.
    """
    known = [f.lengths for f in features if f.per_step and f.lengths is not None]
    return torch.stack([lengths.cpu() for lengths in known]).amax(0) if known else None


def added(some: Tensor, others: Tensor, first: int) -> Tensor:
    """The sum of two tensors whose dimensions from ``first`` on are steps: those that only one of them has are its."""
    for dim in range(first, some.dim()):
        steps, after = max(some.shape[dim], others.shape[dim]), [0, 0] * (some.dim() - dim - 1)
        some, others = (torch.nn.functional.pad(t, [*after, 0, steps - t.shape[dim]]) for t in (some, others))
    return some + others


def align_steps(values: Tensor, lengths: Tensor, align: Align = "start", *, bins: int | None = None) -> Tensor:
    """Values by loop step on an axis that examples of different depth share.

    Args:
        values: ``(..., S)`` by loop step, as ``Influence.sdi``, ``Influence.energy()`` or :func:`self_influence` have
            them.
        lengths: steps that were taken, ``(E,)`` or of another shape that broadcasts to ``values.shape[:-1]``: for
            ``(N, Q, S)`` by query step, the queries' ``(Q,)``; by training step ``(N, 1)``.
        align: ``"start"``: column t is step t. ``"end"``: the last column is each example's last step. ``"share"``: the
            column k of ``bins`` is the k-th share of an example's steps; a step that reaches over several is split
            between them in proportion, so that sums over steps stay what they were.
        bins: columns of ``"share"``; as many as the shortest example has steps if not given, so that every column
            holds at least one step of each.

    Returns:
        ``(..., S)``, for ``"share"`` ``(..., bins)``. NaN where an example has no such step: zero is an influence.

    Raises:
        TypeError: no tensors.
        ValueError: a length is negative or beyond S, ``lengths`` does not broadcast, or ``bins`` goes with another
            alignment.
    """
    one_of("align", align, ALIGNS)
    for name, given in (("values", values), ("lengths", lengths)):
        if not isinstance(given, Tensor) or not given.dim():
            raise TypeError(f"{name}: got {type(given).__name__} {given!r:.60}; pass a tensor of one dimension or more")
    steps = values.shape[-1]
    if lengths.is_floating_point() or lengths.dtype == torch.bool or bool(((lengths < 0) | (lengths > steps)).any()):
        raise ValueError(f"lengths: got {lengths.dtype} up to {lengths.max().item()}; pass whole numbers, 0 to {steps}")
    if bins is not None and align != "share":
        raise ValueError(f"bins: goes with align='share', not with {align!r}")
    try:
        taken = lengths.to(values.device).broadcast_to(values.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"lengths: got shape {tuple(lengths.shape)} for values of shape {tuple(values.shape)}; pass one for each "
            "example, of a shape that broadcasts to all but the last dimension"
        ) from None
    if align == "share":
        return _by_share(values, taken, _bins(lengths, bins))
    place = torch.arange(steps, device=values.device)
    if align == "end":
        place = place - (steps - taken.unsqueeze(-1))
        values = values.gather(-1, place.clamp(min=0))
        return values.where(place >= 0, torch.nan)
    return values.where(place < taken.unsqueeze(-1), torch.nan)


def axis_places(align: Align, count: int) -> NDArray[np.float64]:
    """``(count,)``: where the columns of an alignment lie on its axis: steps from 1 on, steps up to the last one (0),
    or the middles of shares, in per cent."""
    steps = np.arange(1, count + 1, dtype=np.float64)
    return steps if align == "start" else steps - count if align == "end" else 100 * (steps - 0.5) / count


def _bins(lengths: Tensor, bins: int | None) -> int:
    if bins is not None:
        return positive_int("bins", bins)
    taken = lengths[lengths > 0]
    return int(taken.min()) if taken.numel() else 1


def _by_share(values: Tensor, taken: Tensor, bins: int) -> Tensor:
    """``(..., bins)``: a step of a trajectory of L covers ((t - 1) / L, t / L] of the way."""
    out = values.new_full((*values.shape[:-1], bins), torch.nan)
    edges = torch.arange(bins + 1, device=values.device, dtype=torch.float64) / bins
    for length in taken.unique().tolist():
        if not length:
            continue
        steps = torch.arange(length, device=values.device, dtype=torch.float64)[:, None] / length
        shared = torch.minimum(steps + 1 / length, edges[1:]) - torch.maximum(steps, edges[:-1])
        weights = (shared.clamp(min=0) * length).to(values.dtype)
        mine = taken == length
        out[mine] = values[mine][:, :length] @ weights
    return out
