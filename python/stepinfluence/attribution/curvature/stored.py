"""What curvature needs of a store: attribution lies below :mod:`stepinfluence.store` and does not import it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
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
