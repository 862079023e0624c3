"""The train rows that a Fisher is fitted to: features in memory or a store, summed over steps, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.attribution.curvature.factors import CHUNK_BYTES
from stepinfluence.attribution.curvature.stored import StoredFeatures
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import FeatureMismatchError, StoreError

TrainRows: TypeAlias = Features | StoredFeatures
"""What a Fisher can be fitted to: features at one checkpoint, or a store, of which a checkpoint is named."""


@dataclass(frozen=True)
class FitRows:
    """Rows ``(N, D)`` summed over steps, without those that failed; read again for every pass.

    Attributes:
        train: where they come from.
        checkpoint: of a store.
        space: what the columns mean.
        valid: which rows have features.
        losses: ``(N,)`` float64, of the valid rows.
        count, trace: N, and the mean of the squared norms.
    """

    train: TrainRows
    checkpoint: int
    space: FeatureSpace
    valid: npt.NDArray[np.bool_]
    losses: Tensor
    count: int
    trace: float

    @classmethod
    def of(cls, train: TrainRows, checkpoint: int = 0) -> FitRows:
        """Check the rows in one pass.

        Raises:
            TypeError: neither features nor a store.
            FeatureMismatchError: the features were transformed, as only a query's are, or checkpoints are folded.
            StoreError: a shard is missing or damaged.
            ValueError: no row, a value that is not finite, or nothing but zeros.
        """
        if isinstance(train, StoredFeatures):
            if train.manifest.fold is not None:
                raise FeatureMismatchError(
                    f"train: {train.path} holds folded checkpoints, which have no Fisher of their own; "
                    "use the store that was folded"
                )
            if not 0 <= checkpoint < len(train.checkpoints):
                raise StoreError(f"checkpoint: got {checkpoint}; {train.path} has {len(train.checkpoints)}, from 0")
            space, valid, losses = train.checkpoints[checkpoint].space, train.valid, train.losses(checkpoint)
        elif isinstance(train, Features):
            losses = train.losses.detach().cpu().double().numpy()
            space, valid = train.space, ~np.isnan(losses)
        else:
            raise TypeError(f"train: got {type(train).__name__}; pass Features of one checkpoint, or a Store")
        if space.curvature:
            raise FeatureMismatchError(
                "train: these features were transformed as a query's are; pass them untransformed"
            )
        kept = torch.from_numpy(np.asarray(losses)[valid]).double()
        if not len(kept):
            raise ValueError("train: no row has features; there is nothing to fit to")
        rows = cls(train, checkpoint, space, valid, kept, len(kept), 0.0)
        total = 0.0
        for block in rows.blocks():
            total += float(block.double().square().sum())
            if not math.isfinite(total):
                raise ValueError("train: features with values that are not finite; featurize these examples again")
        if total == 0:
            raise ValueError("train: all features are zero; there is no curvature in them")
        return cls(train, checkpoint, space, valid, kept, len(kept), total / len(kept))

    def blocks(self) -> Iterator[Tensor]:
        """``(r, D)`` in order, a bounded number at a time."""
        if isinstance(self.train, StoredFeatures):
            for first, values in self.train.blocks(self.checkpoint):
                good = torch.from_numpy(self.valid[first : first + len(values)])
                some = values if bool(good.all()) else values[good]
                if len(some):
                    yield some.sum(1) if some.dim() == 3 else some
            return
        values = self.train.values.detach()
        size = max(1, CHUNK_BYTES // (8 * max(1, values[0].numel() if len(values) else 1)))
        for k in range(0, len(values), size):
            some = values[k : k + size]
            good = torch.from_numpy(self.valid[k : k + size])
            some = some if bool(good.all()) else some[good.to(some.device)]
            if len(some):
                yield some.sum(1) if some.dim() == 3 else some

    def all(self) -> Tensor:
        """``(N, D)`` in memory."""
        return torch.cat(list(self.blocks()))


@dataclass(frozen=True)
class PooledRows:
    """Rows of several checkpoints, one checkpoint after the other."""

    parts: tuple[FitRows, ...]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def trace(self) -> float:
        """The mean of the squared norms."""
        return sum(part.count * part.trace for part in self.parts) / self.count

    def blocks(self) -> Iterator[Tensor]:
        """``(r, D)`` in order, a bounded number at a time."""
        return (block for part in self.parts for block in part.blocks())

    def all(self) -> Tensor:
        """``(N, D)`` in memory."""
        return torch.cat([part.all() for part in self.parts])
