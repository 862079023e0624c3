"""A checkpoint of a store, as manifests tell of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepinfluence.attribution.curvature.length import Progress
from stepinfluence.attribution.space import FeatureSpace


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint of a store.

    Attributes:
        name: what the user calls it, usually its file's name.
        eta: its weight in influence, usually its learning rate (paper, eq. 1).
        space: what the columns of its features mean; ``space.weights`` and ``space.model_weights`` tell which weights
            they were computed at, in the body and in the whole model.
        progress: how far training had come; or, in words, why that is not known (empty for earlier versions' stores).
            No feature depends on it: it is not compared, and not in the digest.
    """

    name: str
    eta: float
    space: FeatureSpace
    progress: Progress | str = field(default="", compare=False)
