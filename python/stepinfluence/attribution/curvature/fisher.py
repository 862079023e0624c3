"""``Fisher`` and ``BlockFisher``: fitted to train features, applied to a query's."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from stepinfluence.attribution.curvature import factors as of
from stepinfluence.attribution.curvature.damping import Damping, checked, choose
from stepinfluence.attribution.curvature.factors import Factor
from stepinfluence.attribution.curvature.length import TrainingTime
from stepinfluence.attribution.curvature.rows import FitRows, PooledRows, TrainRows
from stepinfluence.attribution.curvature.stored import of_checkpoint
from stepinfluence.attribution.features import Features, weights_digest
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import FeatureMismatchError

Fitted = TypeVar("Fitted", bound="Curvature")


@dataclass(frozen=True, eq=False)
class Curvature(ABC):
    """A damped empirical Fisher of train features at one checkpoint; made by :meth:`fit`.

    Attributes:
        space: of the features that it was fitted to.
        rows: how many these were, N.
        factors: of each range of ``columns``.
        columns: ranges of a feature row, each with a matrix of its own.
        damping: relative to the largest eigenvalue (of each range; of all with ``time``).
        time: training's length T, where the damping is ``1 / T`` (of every range); else None.
        auto: the damping that ``"auto"`` chose; None if it was not asked.
        errors: the criterion's value for each of :data:`.damping.GRID`; empty if ``"auto"`` was not asked.
    """

    space: FeatureSpace
    rows: int
    factors: tuple[Factor, ...]
    columns: tuple[slice, ...]
    damping: float
    auto: float | None = None
    errors: tuple[float, ...] = ()
    time: float | None = None

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def ranges(cls, space: FeatureSpace) -> tuple[slice, ...]:
        """The ranges of columns that have a matrix each."""

    @classmethod
    def fit(
        cls: type[Fitted],
        train: TrainRows,
        *,
        checkpoint: int = 0,
        damping: Damping = "auto",
        rank: int | None = None,
        seed: int = 0,
    ) -> Fitted:
        """Fit to train features, summed over steps.

        Exact where rows or columns are at most :data:`.factors.EXACT_SIDE`; else the leading eigenvectors, by
        randomised subspace iteration in streamed passes, with the mean of the other eigenvalues elsewhere.

        Args:
            train: features of one checkpoint, per step or summed, or a store, read in bounded memory: rows of 32 MiB,
                and eigenvectors and matrices of up to 3 GiB.
            checkpoint: of a store, 0-based.
            damping: relative to the largest eigenvalue, ``"auto"`` (:mod:`.damping`), or by training's length
                (:mod:`.length`): ``"training"`` of a store that knows it, or a :class:`.TrainingTime`.
            rank: leading eigenvectors at most; by memory if not given.
            seed: of the random start.

        Raises:
            FeatureMismatchError: features that were transformed already, or folded checkpoints.
            StoreError: the store is incomplete or damaged.
            ValueError, TypeError: no rows, values that are not finite or all zero, training's length is not known, or
                an argument is none of those.
        """
        given = checked(of_checkpoint(train, checkpoint, damping))
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank: got {rank!r}; give a positive number of eigenvectors, or None")
        rows = FitRows.of(train, checkpoint)
        columns = cls.ranges(rows.space)
        factors = factors_of(rows, columns, rank, seed)
        chosen = choose(rows, factors, columns) if given is None else None
        auto = None if chosen is None else chosen.damping
        errors = () if chosen is None else chosen.errors
        fitted = cls(rows.space, rows.count, tuple(factors), columns, auto or 1.0, auto, errors)
        return fitted if given is None else fitted.with_damping(given)

    def with_damping(self: Fitted, damping: Damping) -> Fitted:
        """The same matrix with another damping; nothing is fitted again.

        Raises:
            ValueError: not a positive number, ``"auto"`` where it was not asked for at the fit, or ``"training"``,
                which is a store's to say: pass a :class:`.TrainingTime`.
        """
        number = checked(damping)
        number = self.auto if number is None else number
        if number is None:
            raise ValueError("damping: 'auto' was not chosen when this was fitted; fit with damping='auto'")
        if isinstance(number, TrainingTime):
            (time,) = number.times
            return replace(self, damping=1 / (time * max(factor.largest for factor in self.factors)), time=time)
        return replace(self, damping=number, time=None)

    @property
    def setting(self) -> Damping:
        """The damping as it can be given to another fit."""
        return self.damping if self.time is None else TrainingTime(self.time)

    def absolute(self, largest: float) -> float:
        """lambda of a matrix with this largest eigenvalue."""
        return self.damping * largest if self.time is None else 1 / self.time

    @property
    def digest(self) -> str:
        """Of everything that scores depend on: equal for equal fits on one machine."""
        parts = (self.kind, self.space, self.rows, self.damping, self.time, [f.rest for f in self.factors])
        tensors = [t for f in self.factors for t in (f.basis, f.values)]
        return hashlib.blake2b(f"{parts!r} {weights_digest(tensors)}".encode(), digest_size=16).hexdigest()

    @property
    def effective_dimension(self) -> float:
        """``trace of F (F + lambda)^-1``: how many directions count more than the damping."""
        found = [f.values / (f.values + self.absolute(f.largest)) for f in self.factors if f.largest > 0]
        return float(sum(part.sum() for part in found))

    def solve(self, values: Tensor) -> Tensor:
        """``(F + lambda)^-1`` times each row of ``values (..., D)``; computed in float64, in the dtype of ``values``.

        Columns in which every train feature is zero become zero: no score depends on them.
        """
        if values.shape[-1] != self.space.width:
            raise FeatureMismatchError(f"values: got {values.shape[-1]} columns; this Fisher has {self.space.width}")
        flat = values.detach().reshape(-1, self.space.width)
        out = torch.zeros_like(flat)
        for factor, cut in zip(self.factors, self.columns, strict=True):
            if factor.largest > 0:
                factor = factor.to(flat.device)
                out[:, cut] = factor.solve(flat[:, cut], self.absolute(factor.largest)).to(flat)
        return out.view_as(values)

    def transform(self, query: Features) -> Features:
        """The query's features times ``(F + lambda)^-1``, per step or summed; scores against untransformed train
        features are then curvature-corrected. They cannot be transformed twice, or stand on the train side.

        Raises:
            FeatureMismatchError: other sketches, parameters, weights or metric than those fitted to (says which).
            ValueError: values that are not finite.
        """
        self.space.require_equal(query.space)
        if query.space.curvature:
            raise FeatureMismatchError("query: these features were transformed already; pass them untransformed")
        good = ~torch.isnan(query.losses.to(query.values.device))
        if not bool(torch.isfinite(query.values[good]).all()):
            raise ValueError("query: features with values that are not finite; featurize these examples again")
        return replace(query, values=self.solve(query.values), space=replace(query.space, curvature=self.digest))

    def leverage(self, train: Features) -> Tensor:
        """Self-influence ``<(F + lambda)^-1 g, phi_t>`` of examples by their own steps.

        Returns:
            ``(N, steps)`` for per-step features; ``(N,)`` for summed ones: ``g^T (F + lambda)^-1 g``.

        Raises:
            FeatureMismatchError, ValueError: as for :meth:`transform`.
        """
        solved = self.transform(train.summed()).values
        if train.per_step:
            return torch.einsum("nsd,nd->ns", train.values, solved)
        return (train.values * solved).sum(1)


class Fisher(Curvature):
    """One matrix over all columns: what one parameter's feature says of another's is used."""

    kind = "fisher"

    @classmethod
    def ranges(cls, space: FeatureSpace) -> tuple[slice, ...]:
        """All columns."""
        return (slice(0, space.width),)


class BlockFisher(Curvature):
    """A matrix for each parameter tensor: ``m x m``, cheap to fit where there are many rows."""

    kind = "block"

    @classmethod
    def ranges(cls, space: FeatureSpace) -> tuple[slice, ...]:
        """Of each parameter.

        Raises:
            ValueError: parameters share their columns (``sum`` layout).
        """
        if space.layout == "sum":
            raise ValueError(
                "train: in the sum layout all parameters share their columns; use Fisher, or featurize with "
                "layout='concat'"
            )
        return tuple(slice(block.start, block.stop) for block in space.blocks if block.stop > block.start)


KINDS: dict[str, type[Curvature]] = {kind.kind: kind for kind in (Fisher, BlockFisher)}


def factors_of(rows: FitRows | PooledRows, columns: Sequence[slice], rank: int | None, seed: int) -> list[Factor]:
    """A factor for each range of columns."""
    widths = [cut.stop - cut.start for cut in columns]
    widest, total = max(widths), sum(widths)
    if rows.count <= min(widest, of.EXACT_SIDE) and 8 * rows.count * total <= of.FACTOR_BYTES:
        everything = rows.all()
        return [of.of_rows(everything[:, cut], rank) for cut in columns]
    if widest <= of.EXACT_SIDE:
        found: list[Factor] = []
        while len(found) < len(columns):
            some = _that_fit(columns[len(found) :])
            found += [of.of_gram(gram, _bounded(rank, total)) for gram in of.grams(rows.blocks, some, rows.count)]
        return found
    found = []
    for cut in columns:

        def stream(cut: slice = cut) -> Iterator[Tensor]:
            return (block[:, cut] for block in rows.blocks())

        whole = len(columns) == 1
        trace = rows.trace if whole else sum(float(b.double().square().sum()) for b in stream()) / rows.count
        most = min(_bounded(rank, total), of.RANK if rank is None else rank)
        found.append(of.leading(stream, cut.stop - cut.start, rows.count, trace, most, seed=seed))
    return found


def _that_fit(columns: Sequence[slice]) -> Sequence[slice]:
    """The first ranges whose matrices fit the memory together; at least one."""
    total = 0
    for k, cut in enumerate(columns):
        total += 8 * (cut.stop - cut.start) ** 2
        if k and total > of.FACTOR_BYTES:
            return columns[:k]
    return columns


def _bounded(rank: int | None, total: int) -> int:
    """The rank whose eigenvectors, of ``total`` columns together, fit the memory."""
    most = max(1, of.FACTOR_BYTES // (8 * total))
    return most if rank is None else min(rank, most)
