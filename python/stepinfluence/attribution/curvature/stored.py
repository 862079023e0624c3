"""What curvature needs of a store: attribution lies below :mod:`stepinfluence.store` and does not import it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from stepinfluence.attribution.curvature.length import Progress, TrainingTime, known

if TYPE_CHECKING:
    from torch import Tensor

    from stepinfluence.attribution.features import Features


@runtime_checkable
class StoredFeatures(Protocol):
    """Features on disk, as :class:`stepinfluence.store.Store` reads them; its docstrings say what each of these is."""

    path: Path
    manifest: Any

    @property
    def checkpoints(self) -> Sequence[Any]: ...
    @property
    def valid(self) -> npt.NDArray[np.bool_]: ...
    def __len__(self) -> int: ...
    def losses(self, checkpoint: int = 0) -> npt.NDArray[Any]: ...
    def blocks(self, checkpoint: int = 0) -> Iterator[tuple[int, Tensor]]: ...
    def features(self, checkpoint: int = 0, rows: Sequence[int] | None = None) -> Features: ...
    def row(self, row: int) -> Any: ...


def known_time(store: StoredFeatures) -> TrainingTime:
    """Training's length by each checkpoint of a store.

    Raises:
        ValueError: it is not known (says why).
    """
    return TrainingTime.of(known([(checkpoint.name, checkpoint.progress) for checkpoint in store.checkpoints]))


def known_progress(store: StoredFeatures) -> list[Progress]:
    """How far training had come at each checkpoint of a store, for SOURCE.

    Raises:
        ValueError: it is not known (says why).
    """
    pairs = [(checkpoint.name, checkpoint.progress) for checkpoint in store.checkpoints]
    return known(pairs, asked="curvature: 'source'", instead="'fisher'")


def of_checkpoint(train: object, checkpoint: int, damping: Any) -> Any:
    """A damping for one checkpoint: ``"training"`` looked up in a store, several lengths cut to one, others as they
    are.

    Raises:
        ValueError: training's length is not known, or is not by this store's checkpoints.
    """
    if not isinstance(train, StoredFeatures):
        return damping
    if isinstance(damping, str) and damping == "training":
        damping = known_time(train)
    if isinstance(damping, TrainingTime) and len(damping.times) > 1:
        return damping.at(checkpoint, len(train.checkpoints))
    return damping
