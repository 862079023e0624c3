"""What is asked of the rows: query vectors by checkpoint, checked to be comparable, weighted, and cut to a part."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.arguments import per_checkpoint
from stepinfluence.attribution.curvature import Choice, Curvature, Damping, Unrolled
from stepinfluence.attribution.curvature.choice import fitted
from stepinfluence.attribution.extremes import TOO_LARGE, largest, tell_of_small
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import Parameters
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.machine import usable_device
from stepinfluence.search.sources import FeatureSource, Rows, RowSource, StoreSource, as_source, lengths_of
from stepinfluence.store import Store

Steps: TypeAlias = int | slice | range | None
"""Query steps, 0-based: one, or a range; None for all."""


@dataclass(frozen=True)
class Question:
    """Queries ready to be multiplied with rows.

    Attributes:
        train: the rows.
        query: what the queries' features came from.
        vectors: by checkpoint ``(Q, S, columns)``: the query's features times the checkpoint's eta, zero in columns of
            other parameters. ``S`` is 1 for queries summed over steps.
        parameters: that influence is restricted to, as they were asked for.
        columns: the columns of a row that these stand for.
        ranked: the steps that rows are ranked by, 0-based.
        per_step: whether each of them is ranked for itself, rather than their sum.
        summed: whether the queries' features are summed over steps.
        harmful: whether the lowest rows come first, rather than the highest.
        curvature: of each checkpoint, that the queries were corrected with, or SOURCE of all; None for SDI.
        valid: ``(Q,)``: False for queries that have no features.
        query_ids, etas: as in results.
        device: where to compute.
    """

    train: RowSource
    query: RowSource
    vectors: tuple[Tensor, ...]
    parameters: Parameters
    columns: slice
    ranked: tuple[int, ...]
    per_step: bool
    summed: bool
    harmful: bool
    curvature: tuple[Curvature, ...] | Unrolled | None
    valid: npt.NDArray[np.bool_]
    query_ids: tuple[Hashable, ...]
    etas: tuple[float, ...]
    device: torch.device

    @property
    def steps(self) -> int:
        return self.vectors[0].shape[1]

    def lengths(self) -> Tensor | None:
        """``(Q,)`` int64: the last step that each query's loss depends on, at any checkpoint that counts; None where
        the queries do not tell."""
        return lengths_of(self.query, self.counted)

    @property
    def counted(self) -> tuple[int, ...]:
        """The checkpoints that count: those with a weight; one of them where none has."""
        return tuple(k for k, eta in enumerate(self.etas) if eta) or (0,)

    @property
    def corrected(self) -> bool:
        """Whether the queries were corrected for curvature."""
        return self.curvature is not None

    def heads(self) -> tuple[Tensor, ...]:
        """By checkpoint ``(C, columns)``, one vector for each ranking: ``Q``, or ``Q * len(ranked)`` of them."""
        chosen = [v[:, list(self.ranked)] for v in self.vectors]
        return tuple(v.flatten(0, 1) if self.per_step else v.sum(1) for v in chosen)


def chosen_steps(steps: Steps, count: int) -> tuple[int, ...]:
    """The 0-based steps that ``steps`` stands for.

    Raises:
        ValueError: none, or a step beyond the last.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | slice | range | None):
        raise ValueError(f"steps: got {steps!r}; pass a 0-based step, a slice or a range")
    if not count:
        raise ValueError("query: has no rows, and so no steps; there is nothing to ask about")
    found: Sequence[int]
    if isinstance(steps, int):
        found = [steps + count if steps < 0 else steps]
    else:
        found = range(count) if steps is None else range(count)[steps] if isinstance(steps, slice) else steps
    if not len(found) or min(found) < 0 or max(found) >= count:
        raise ValueError(f"steps: got {steps!r}; the queries have steps 0 to {count - 1}")
    return tuple(found)


def resolved_etas(train: RowSource, given: float | Sequence[float] | None) -> tuple[float, ...]:
    """The weight of each checkpoint: as given, or the rows' own, or 1."""
    count = len(train.spaces)
    if given is None:
        return train.etas if train.etas is not None else (1.0,) * count
    return tuple(per_checkpoint("etas", given, count))


def _compare(given: tuple[Rows, Rows], train: RowSource, query: RowSource) -> None:
    if isinstance(given[0], Store) and isinstance(given[1], Store):
        given[0].require_comparable(given[1])
        if given[0].manifest.fold != given[1].manifest.fold:
            raise FeatureMismatchError(
                f"query: {given[1].path}: its checkpoints are folded otherwise than those of {given[0].path}; "
                "fold both alike"
            )
    if len(train.spaces) != len(query.spaces):
        raise FeatureMismatchError(
            f"query: has features of {len(query.spaces)} checkpoints, train of {len(train.spaces)}; "
            "give one of each per checkpoint"
        )
    for ours, theirs in zip(train.spaces, query.spaces, strict=True):
        ours.require_equal(theirs)


def corrections(train: Rows, curvature: Choice, damping: Damping | None) -> list[Curvature] | Unrolled | None:
    """What each checkpoint's queries are multiplied by, or those of the last are carried back by; None for nothing.

    Raises:
        FeatureMismatchError, ValueError, TypeError: it was fitted to other features, or is no curvature.
    """
    found = fitted([train] if isinstance(train, Features) else train, curvature, damping)
    spaces = as_source("train", train).spaces
    if isinstance(found, Unrolled):
        found.require_fitted_to(spaces)
        return found
    for one, space in zip(found or (), spaces, strict=False):
        one.space.require_equal(space)
    return found


def default_device(train: RowSource) -> torch.device:
    """Where rows already are, or a GPU if there is one for rows that are read from disk."""
    if isinstance(train, StoreSource) and torch.cuda.is_available():
        return torch.device("cuda")
    return train.device


def _padded(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors ``(Q, S, D)`` of several checkpoints, of as many steps as the one with the most."""
    longest = max(v.shape[1] for v in vectors)
    return [torch.nn.functional.pad(v, (0, 0, 0, longest - v.shape[1])) for v in vectors]


def _check_weighted(vectors: Sequence[Tensor], before: Sequence[Tensor], asked: FeatureSource | StoreSource) -> None:
    """Raise where what was made of queries that are finite is not, or where etas were so small that nothing is left of
    any of them, at any checkpoint; warn of some.

    Args:
        before: by checkpoint ``(Q,)``: their largest magnitude without the eta; 0 where that is 0.

    Raises:
        ValueError: it is so.
    """
    for checkpoint, values in enumerate(vectors):
        for row in (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
            if bool(asked.take(checkpoint, [row]).isfinite().all()):
                raise ValueError(TOO_LARGE)
    after = torch.stack([largest(values, (1, 2)) for values in vectors]).amax(0)
    had = torch.stack(list(before)).amax(0) > 0
    tell_of_small(torch.where(had, after.clamp(min=5e-324), 0.0), vectors[0].dtype, asked.ids())


def ask(
    train: Rows,
    query: Rows,
    *,
    per_step: bool = False,
    harmful: bool = False,
    etas: float | Sequence[float] | None = None,
    parameters: Parameters = None,
    steps: Steps = None,
    curvature: Choice = "none",
    damping: Damping | None = None,
    device: torch.device | str | None = None,
) -> Question:
    """Check two sides of a search against each other and prepare the queries.

    Args:
        train, query, per_step, harmful, etas, parameters, steps, device: as for :func:`stepinfluence.search.top_k`.

    Raises:
        FeatureMismatchError: the sides cannot be compared (says what differs).
        ValueError, TypeError, StoreError: an argument is none of those that :func:`stepinfluence.search.top_k` names.
    """
    source: FeatureSource | StoreSource = as_source("train", train)
    asked = as_source("query", query)
    _compare((train, query), source, asked)
    if not asked.per_step and (per_step or steps is not None):
        raise ValueError(
            f"{'per_step' if per_step else 'steps'}: the queries' features are summed over steps; "
            "featurize them with per_step=True"
        )
    found = corrections(train, curvature, damping)
    unrolled = isinstance(found, Unrolled)
    weights = resolved_etas(source, 1.0 if unrolled and etas is None else etas)
    if unrolled and not {*weights} <= {0.0, 1.0}:
        raise ValueError(
            "etas: SOURCE weights checkpoints by their segments' learning rates; leave etas out (or 0 for those that "
            "are not to count)"
        )
    if found is not None and any(space.curvature for space in asked.spaces):
        raise FeatureMismatchError("query: these features were transformed already; leave curvature='none'")
    space = source.spaces[0]
    blocks = space.select(parameters)
    columns = slice(min(b.start for b in blocks), max(b.stop for b in blocks))
    outside = [block for block in space.blocks if block not in blocks]
    place = default_device(source) if device is None else usable_device(device)
    everyone, vectors, before = range(len(asked)), [], []
    carried = (
        found.carried(asked.take(len(weights) - 1, everyone).to(place, source.dtype))
        if isinstance(found, Unrolled)
        else None
    )
    for checkpoint, eta in enumerate(weights):
        if carried is not None:
            values = carried[checkpoint].clone()  # a segment's checkpoints share theirs, and columns are set to zero
        else:
            values = asked.take(checkpoint, everyone).to(place, source.dtype)
            values = found[checkpoint].solve(values) if isinstance(found, list) else values
        before.append(largest(values, tuple(range(1, values.dim()))) * bool(eta))
        values = (values if asked.per_step else values.unsqueeze(1)) * eta
        for block in outside:
            values[:, :, block.start : block.stop] = 0
        vectors.append(values[:, :, columns])
    _check_weighted(vectors, before, asked)
    vectors = _padded(vectors)
    return Question(
        train=source,
        query=asked,
        vectors=tuple(vectors),
        parameters=parameters,
        columns=columns,
        ranked=chosen_steps(steps, vectors[0].shape[1]) if asked.per_step else (0,),
        per_step=per_step,
        summed=not asked.per_step,
        harmful=harmful,
        curvature=tuple(found) if isinstance(found, list) else found,
        valid=asked.valid,
        query_ids=asked.ids(),
        etas=weights,
        device=place,
    )
