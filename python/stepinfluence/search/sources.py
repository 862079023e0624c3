"""Where the rows of a search come from: features in memory, or a store, behind one protocol."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.attribution.alignment import aligned_to
from stepinfluence.attribution.features import Features, weights_digest
from stepinfluence.attribution.space import FeatureSpace
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.files import file_digest
from stepinfluence.store import Store, bytes_per_row
from stepinfluence.store.codecs import rounding_norm
from stepinfluence.store.manifest import MANIFEST, SketchSpec
from stepinfluence.store.shards import record_path

Rows: TypeAlias = Store | Features | Sequence[Features]
"""What a search takes for a side: a store, features at one checkpoint, or a list of features, one per checkpoint."""

KEPT_MAP_BYTES = 16 << 30
"""Stores up to this size stay mapped while they are open: mapping costs a scan as much again as reading does. Mapped
pages belong to the system's file cache, which takes them back when memory is short; their tables take 1/512 of this."""


@dataclass(frozen=True)
class RawBlock:
    """Consecutive rows as they are stored.

    Attributes:
        first: number of the first row.
        codes: ``(r, [steps,] D)``: float64, float32, float16, bfloat16 or int8.
        scales: ``(r[, steps])`` float32 where value = code * scale, else None.
    """

    first: int
    codes: Tensor
    scales: Tensor | None

    def part(self, start: int, stop: int) -> RawBlock:
        """Rows ``start:stop`` of the block; nothing is copied."""
        scales = None if self.scales is None else self.scales[start:stop]
        return RawBlock(self.first + start, self.codes[start:stop], scales)


@dataclass(frozen=True)
class Folded:
    """What was folded into one checkpoint: its parts, and the seed of the signs."""

    parts: tuple[FoldedPart, ...]
    seed: int


@dataclass(frozen=True)
class FoldedPart:
    """One of the checkpoints that were folded into one: digests of its weights (see ``FeatureSpace``), and its eta."""

    weights: str
    model_weights: str
    eta: float


class RowSource(Protocol):
    """Rows of features at one or more checkpoints, read block by block or a few at a time."""

    @property
    def spaces(self) -> tuple[FeatureSpace, ...]:
        """What the columns mean, by checkpoint."""

    @property
    def etas(self) -> tuple[float, ...] | None:
        """The weight of each checkpoint; None if the rows do not tell."""

    @property
    def folded(self) -> Folded | None:
        """What was folded into the only checkpoint; None for others."""

    @property
    def sketch(self) -> SketchSpec | None:
        """How the sketches were made; None if the rows do not tell, or are none."""

    @property
    def per_step(self) -> bool: ...

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """``(N,)``: False for rows without features at some checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """What inner products are taken in: float32, or float64."""

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def id_of(self, row: int) -> Hashable: ...

    def ids(self) -> tuple[Hashable, ...]: ...

    def text_of(self, row: int) -> str | None:
        """What a store holds of an example, for people; None if the rows do not tell."""

    def losses(self, checkpoint: int) -> npt.NDArray[np.floating[Any]]:
        """``(N,)``; NaN for rows that failed."""

    def lengths(self, checkpoint: int) -> npt.NDArray[np.int64] | None:
        """``(N,)``: the last loop step (1-based) that each row's loss depends on; None if the rows do not tell."""

    def blocks(self, checkpoint: int) -> Iterator[RawBlock]:
        """All rows in order; the same cuts at every checkpoint."""

    def take(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        """Decoded values ``(len(rows), [steps,] D)`` of some rows."""

    def stored_error(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        """``(len(rows),)``: what storing may have moved :meth:`take` by, in the norm, summed over steps."""

    def digest(self) -> str:
        """Of the content: equal for equal rows."""


def _stored_error(values: Tensor, stored_as: str) -> Tensor:
    errors = rounding_norm(values, stored_as) if stored_as else values.new_zeros(values.shape[:-1])
    return (errors.sum(1) if errors.dim() == 2 else errors).cpu()


class FeatureSource:
    """Features in memory, one per checkpoint. A row with a NaN loss is one that failed."""

    def __init__(self, name: str, features: Sequence[Features]) -> None:
        if not features:
            raise ValueError(f"{name}: got no features; give one per checkpoint")
        features = [features[0], *(aligned_to(features[0], other, name) for other in features[1:])]
        if len({f.per_step for f in features}) > 1:
            raise FeatureMismatchError(f"{name}: features per step at some checkpoints and summed at others")
        self._features = list(features)
        self.spaces = tuple(f.space for f in features)
        self.etas = self.folded = self.sketch = None
        self.per_step = features[0].per_step
        self.valid = ~np.isnan(np.stack([f.losses.cpu().numpy() for f in features])).any(0)
        self.dtype = torch.promote_types(features[0].values.dtype, torch.float32)
        self.device = features[0].values.device

    def __len__(self) -> int:
        return len(self._features[0])

    def id_of(self, row: int) -> Hashable:
        return self._features[0].ids[row]

    def ids(self) -> tuple[Hashable, ...]:
        return self._features[0].ids

    def text_of(self, row: int) -> str | None:
        return None

    def losses(self, checkpoint: int) -> npt.NDArray[np.floating[Any]]:
        return np.asarray(self._features[checkpoint].losses.detach().cpu().numpy())

    def lengths(self, checkpoint: int) -> npt.NDArray[np.int64] | None:
        lengths = self._features[checkpoint].lengths
        return None if lengths is None else np.asarray(lengths.cpu().numpy())

    def blocks(self, checkpoint: int) -> Iterator[RawBlock]:
        yield RawBlock(0, self._features[checkpoint].values.detach(), None)

    def take(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        return self._features[checkpoint].values.detach()[list(rows)]

    def stored_error(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        return _stored_error(self.take(checkpoint, rows), self._features[checkpoint].stored_as)

    def digest(self) -> str:
        return weights_digest([f.values for f in self._features])


_KEPT_MAPS: weakref.WeakKeyDictionary[Store, dict[int, list[RawBlock]]] = weakref.WeakKeyDictionary()
"""Blocks of stores that are open, by checkpoint. Shards never change once they are there."""


class StoreSource:
    """A store on disk: blocks are its shards, memory-mapped, as they are."""

    def __init__(self, name: str, store: Store) -> None:
        if not store.complete:
            raise StoreError(
                f"{name}: {store.path} is incomplete ({store.missing_count} shards missing); featurize again to resume"
            )
        self._store = store
        self.spaces = tuple(c.space for c in store.checkpoints)
        self.etas = tuple(c.eta for c in store.checkpoints)
        self.sketch = store.manifest.sketch
        self.per_step = store.per_step
        self.valid = store.valid
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @property
    def folded(self) -> Folded | None:
        fold = self._store.manifest.fold
        if fold is None:
            return None
        parts = (FoldedPart(c["weights"], c["model_weights"], float(c["eta"])) for c in fold["checkpoints"])
        return Folded(tuple(parts), fold["seed"])

    def __len__(self) -> int:
        return len(self._store)

    def id_of(self, row: int) -> Hashable:
        return self._store.row(row).id

    def ids(self) -> tuple[Hashable, ...]:
        return tuple(self._store.ids)

    def text_of(self, row: int) -> str | None:
        return self._store.row(row).text

    def losses(self, checkpoint: int) -> npt.NDArray[np.floating[Any]]:
        return self._store.losses(checkpoint)

    def lengths(self, checkpoint: int) -> npt.NDArray[np.int64] | None:
        return self._store.lengths(checkpoint)

    def blocks(self, checkpoint: int) -> Iterator[RawBlock]:
        kept = _KEPT_MAPS.setdefault(self._store, {})
        if checkpoint in kept:
            yield from kept[checkpoint]
            return
        manifest = self._store.manifest
        rows = manifest.n_rows * len(manifest.checkpoints) * (max(1, self._store.steps) if self.per_step else 1)
        if rows * bytes_per_row(manifest.width, manifest.dtype) > KEPT_MAP_BYTES:
            yield from self._mapped(checkpoint)
            return
        kept[checkpoint] = list(self._mapped(checkpoint))
        yield from kept[checkpoint]

    def _mapped(self, checkpoint: int) -> Iterator[RawBlock]:
        for first, codes, scales in self._store.raw_blocks(checkpoint):
            tensor = torch.from_numpy(codes)
            if self._store.manifest.dtype == "bf16":
                tensor = tensor.view(torch.bfloat16)
            yield RawBlock(first, tensor, None if scales is None else torch.from_numpy(scales))

    def take(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        return self._store.values(checkpoint, rows)

    def stored_error(self, checkpoint: int, rows: Sequence[int]) -> Tensor:
        return _stored_error(self.take(checkpoint, rows), self._store.manifest.dtype)

    def digest(self) -> str:
        # A commit record holds the checksums of its shard's files.
        path, manifest = self._store.path, self._store.manifest
        digest = hashlib.sha256(file_digest(path / MANIFEST).encode())
        for checkpoint in range(len(manifest.checkpoints)):
            for shard in range(manifest.n_shards):
                digest.update(file_digest(record_path(path, checkpoint, shard)).encode())
        return digest.hexdigest()


def lengths_of(source: RowSource, checkpoints: Sequence[int]) -> Tensor | None:
    """``(N,)`` int64: the last loop step (1-based) that a row's loss depends on at any of some checkpoints; None where
    the rows do not tell."""
    known = [found for found in (source.lengths(k) for k in checkpoints) if found is not None]
    return torch.from_numpy(np.stack(known).max(0)) if len(known) == len(checkpoints) else None


def as_source(name: str, given: Rows) -> FeatureSource | StoreSource:
    """The rows of one side of a search.

    Raises:
        TypeError: neither features nor a store.
        StoreError: the store is incomplete.
        FeatureMismatchError, ValueError: features of several checkpoints that are not of the same examples, or none.
    """
    if isinstance(given, Store):
        return StoreSource(name, given)
    several = [given] if isinstance(given, Features) else given
    if isinstance(several, Sequence) and all(isinstance(f, Features) for f in several):
        for one in several:
            one.require_whole(name)
        return FeatureSource(name, several)
    raise TypeError(f"{name}: got {type(given).__name__}; pass a Store, Features, or a list of Features")
