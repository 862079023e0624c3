r"""Influence through training, segment by segment, step by step: SOURCE in the space of features.

Bae et al., "Training data attribution via approximate unrolled differentiation" (arXiv 2405.12186). Training is cut
into segments ``l = 1 ... L``, each with a learning rate ``eta_l``, a number of updates ``K_l``, a Hessian ``H_l`` and a
mean gradient ``g_l(z)`` of each train example. What a change of the weights in a segment leaves at its end, and what a
steady pull by ``g_l`` adds up to within it, are functions of the Hessian's eigenvalues,

    S_l = exp(-eta_l K_l H_l),          R_l = (1 - exp(-eta_l K_l H_l)) H_l^-1,

and the influence on a query is ``sum_l <R_l S_(l+1) ... S_L grad(z'), g_l(z)>``. It is linear in the query's gradient,
so that each of its loop steps has a share of it, and the shares add up,

    I_t(z, z') = sum_l <R_l S_(l+1) ... S_L phi_t(z'), g_l(z)>.

``H_l`` is the empirical Fisher of the features of the segment's checkpoints, ``g_l`` their mean. Two limits are known
by other names: for a small ``eta_l K_l H_l`` this is TracIn with weights ``eta_l K_l`` (paper, eq. 1), for a large one
in the last segment it is the influence function, ``<H_L^-1 phi_t, g_L>``. Nothing is damped: ``R`` has no pole.

Only the query is transformed, once for each checkpoint: whatever takes features of several checkpoints takes these.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stepinfluence.arguments import one_of, positive_float, positive_int
from stepinfluence.attribution.curvature.factors import Factor
from stepinfluence.attribution.curvature.fisher import KINDS, factors_of
from stepinfluence.attribution.curvature.length import Progress, TrainingTime
from stepinfluence.attribution.curvature.rows import FitRows, PooledRows
from stepinfluence.attribution.curvature.stored import StoredFeatures
from stepinfluence.attribution.features import Features, weights_digest
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import FeatureMismatchError


@dataclass(frozen=True)
class Segment:
    """A stretch of training.

    Attributes:
        checkpoints: their places among all, 0-based; features of each are averaged.
        learning_rate: the mean over its updates; with momentum mu, divided by ``1 - mu``.
        updates: how many.

    Raises:
        TypeError, ValueError: no checkpoint, or a number that is not positive.
    """

    checkpoints: Sequence[int]
    learning_rate: float
    updates: int

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("checkpoints: got none; give the places of the segment's checkpoints")
        positive_float("learning_rate", self.learning_rate)
        positive_int("updates", self.updates)

    def kept(self, values: Tensor) -> Tensor:
        """``S`` of eigenvalues."""
        return torch.exp(-self.learning_rate * self.updates * values)

    def gathered(self, values: Tensor) -> Tensor:
        """``R`` of eigenvalues; ``eta K`` where one is 0."""
        time = self.learning_rate * self.updates
        small = values * time < torch.finfo(values.dtype).tiny
        safe = torch.where(small, torch.ones_like(values), values)
        return torch.where(small, torch.full_like(values, time), -torch.expm1(-time * safe) / safe)


SEGMENTS = 3
"""That training is cut into where nobody says; fewer where there are fewer checkpoints."""


def segments_of(progress: Sequence[Progress], count: int = SEGMENTS) -> list[Segment]:
    """Segments of training that checkpoints tell of: each ends at a checkpoint, and has about as many as the others.

    The learning rate of a segment is the mean over its updates of the learning rate times what the optimizer multiplies
    a gradient with, as :meth:`.TrainingTime.of` has it.

    Args:
        progress: at each checkpoint, in the order of training.
        count: how many segments, at most one for each checkpoint.

    Raises:
        ValueError: fewer than two checkpoints, a segment without a learning rate, or as for :meth:`.TrainingTime.of`.
    """
    positive_int("count", count)
    places = len(progress)
    if places < 2:
        raise ValueError(
            f"curvature: 'source' follows training from checkpoint to checkpoint, and there is {places}; featurize at "
            "several (three or more, along training), or use 'fisher'"
        )
    times = (0.0, *TrainingTime.of(progress).times)
    updates = (0, *(one.updates for one in progress))
    count = min(count, places)
    cuts = [round(places * k / count) for k in range(count + 1)]
    found = []
    for first, last in itertools.pairwise(cuts):
        length = updates[last] - updates[first]
        if times[last] <= times[first]:
            raise ValueError(f"checkpoints: the learning rate is 0 from update {updates[first]} to {updates[last]}")
        found.append(Segment(tuple(range(first, last)), (times[last] - times[first]) / length, length))
    return found


@dataclass(frozen=True, eq=False)
class Unrolled:
    """SOURCE fitted to train features at checkpoints; made by :meth:`fit`.

    Attributes:
        segments: in the order of training.
        spaces: of the features of each checkpoint.
        factors: by segment, a Fisher's eigenvectors for each range of ``columns``.
        columns: ranges of a feature row.
    """

    segments: tuple[Segment, ...]
    spaces: tuple[FeatureSpace, ...]
    factors: tuple[tuple[Factor, ...], ...]
    columns: tuple[slice, ...]

    @classmethod
    def fit(
        cls,
        train: StoredFeatures | Sequence[Features],
        segments: Sequence[Segment],
        *,
        curvature: Literal["fisher", "block"] = "fisher",
        rank: int | None = None,
        seed: int = 0,
    ) -> Unrolled:
        """Fit a Fisher to the train features of each segment's checkpoints, summed over steps.

        Args:
            train: features of the training examples, one per checkpoint, in the order of training; or a store, which is
                read in bounded memory.
            segments: in the order of training; together they have each checkpoint once, in order.
            curvature: one matrix over all columns, or one for each parameter tensor.
            rank, seed: as for :meth:`.Curvature.fit`.

        Raises:
            FeatureMismatchError: the checkpoints' features are of different sketches, parameters or metrics, were
                transformed, or are folded.
            ValueError, TypeError: segments do not fit the checkpoints, or as for :meth:`.Curvature.fit`.
        """
        one_of("curvature", curvature, tuple(KINDS))
        if isinstance(train, StoredFeatures):
            rows = [FitRows.of(train, k) for k in range(len(train.checkpoints))]
        else:
            rows = [FitRows.of(features) for features in train]
        given = [k for segment in segments for k in segment.checkpoints]
        if not rows or given != list(range(len(rows))):
            raise ValueError(
                f"segments: got checkpoints {given} of {len(rows)}; give each checkpoint to one segment, in the order "
                "of training"
            )
        spaces = tuple(part.space for part in rows)
        for space in spaces[1:]:
            _same_columns(spaces[0], space)
        columns = KINDS[curvature].ranges(spaces[0])
        pooled = [PooledRows(tuple(rows[k] for k in segment.checkpoints)) for segment in segments]
        factors = tuple(tuple(factors_of(part, columns, rank, seed)) for part in pooled)
        return cls(tuple(segments), spaces, factors, columns)

    @property
    def digest(self) -> str:
        """Of everything that scores depend on: equal for equal fits on one machine."""
        parts = [(tuple(s.checkpoints), s.learning_rate, s.updates) for s in self.segments]
        rest = [[factor.rest for factor in each] for each in self.factors]
        tensors = [t for each in self.factors for factor in each for t in (factor.basis, factor.values)]
        content = f"unrolled {parts!r} {self.spaces!r} {rest!r} {weights_digest(tensors)}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def transform(self, query: Features) -> list[Features]:
        """The query's features for each checkpoint, such that ``influence(train, these)``, with ``etas`` of 1, is by
        query step how far its loss falls for a unit of an example's weight, where training lowers the *sum* of weighted
        losses over N (times N, which is left out as in all scores here).

        Args:
            query: features at the end of training, per step or summed.

        Raises:
            FeatureMismatchError: other sketches, parameters or metric than those fitted to (says which), the weights of
                an earlier checkpoint than the last, or features that were transformed already.
            ValueError: values that are not finite.
        """
        first = self.spaces[0]
        replace(first, weights="", model_weights="").require_equal(replace(query.space, weights="", model_weights=""))
        if query.space.curvature:
            raise FeatureMismatchError("query: these features were transformed already; pass them untransformed")
        earlier = [space.weights for space in self.spaces]
        if query.space.weights in earlier and query.space.weights != earlier[-1]:
            raise FeatureMismatchError(
                f"query: features at the weights of checkpoint {earlier.index(query.space.weights)}, which is not the "
                "last; featurize the query at the end of training"
            )
        good = ~torch.isnan(query.losses.to(query.values.device))
        if not bool(torch.isfinite(query.values[good]).all()):
            raise ValueError("query: features with values that are not finite; featurize these examples again")
        digest = self.digest
        return [
            replace(query, values=values, space=replace(self.spaces[k], curvature=digest))
            for k, values in enumerate(self.carried(query.values))
        ]

    def carried(self, values: Tensor) -> list[Tensor]:
        """``R_l S_(l+1) ... S_L`` over the number of its segment's checkpoints, times each row of ``values (..., D)``,
        for each checkpoint; computed in float64, in the dtype of ``values``."""
        left = values.detach().reshape(-1, self.spaces[0].width).double()
        found: dict[int, Tensor] = {}
        for segment, factors in zip(reversed(self.segments), reversed(self.factors), strict=True):
            part = self._applied(factors, left, segment.gathered) / len(segment.checkpoints)
            found.update(dict.fromkeys(segment.checkpoints, part.to(values.dtype).view_as(values)))
            left = self._applied(factors, left, segment.kept)
        return [found[k] for k in range(len(self.spaces))]

    def gathered(self, rows: Sequence[Tensor]) -> Tensor:
        """What train rows ``(n, D)`` at each checkpoint have become at the end of training: its inner product with a
        query's features there is their influence. The transpose of :meth:`carried`, for few rows and many queries."""
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for segment, factors in zip(self.segments, self.factors, strict=True):
            mean = torch.stack([rows[k].detach().double() for k in segment.checkpoints]).sum(0)
            pulled = self._applied(factors, mean, segment.gathered) / len(segment.checkpoints)
            total = self._applied(factors, total, segment.kept) + pulled
        return total.to(rows[0].dtype)

    def _applied(self, factors: Sequence[Factor], rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        out = torch.empty_like(rows)
        for factor, cut in zip(factors, self.columns, strict=True):
            out[:, cut] = factor.to(rows.device).apply(rows[:, cut], function)
        return out

    def require_fitted_to(self, spaces: Sequence[FeatureSpace]) -> None:
        """Raise unless these are the spaces, by checkpoint, of the features that it was fitted to.

        Raises:
            FeatureMismatchError: they are not (says what differs).
        """
        if len(spaces) != len(self.spaces):
            raise FeatureMismatchError(
                f"curvature: SOURCE was fitted to {len(self.spaces)} checkpoints, and these are features of "
                f"{len(spaces)}; fit it to these"
            )
        for mine, other in zip(self.spaces, spaces, strict=True):
            mine.require_equal(other)


def _same_columns(first: FeatureSpace, other: FeatureSpace) -> None:
    """Whether features of two checkpoints have the same columns.

    Raises:
        FeatureMismatchError: they have not.
    """
    if (first.kind, first.blocks, first.tables) != (other.kind, other.blocks, other.tables):
        raise FeatureMismatchError(
            "train: the checkpoints' features are of other parameters or sketches than the first's; use one capture "
            "for all"
        )
    if first.metric != other.metric:
        raise FeatureMismatchError(
            "train: the checkpoints' features are under different metrics, between which sketches cannot be carried; "
            "featurize all checkpoints and the query under one preconditioner, such as the last checkpoint's"
        )
