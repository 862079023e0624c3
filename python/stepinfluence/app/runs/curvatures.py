"""The curvatures of a run's train rows, fitted at first use and kept in the run's folder."""

from __future__ import annotations

from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.attribution.curvature import Curvature, Damping, load, save
from stepinfluence.attribution.curvature.choice import KINDS
from stepinfluence.errors import ConfigError, StoreError
from stepinfluence.search.sources import StoreSource
from stepinfluence.store import Store

FOLDER = "curvature"


def kept_curvatures(run: StoredRun, train: Store, kind: str, damping: Damping = "auto") -> list[Curvature] | None:
    """The curvature of each checkpoint of a run's store, or None for ``"none"``.

    It is kept in ``RUN/curvature/SPLIT/KIND-CHECKPOINT`` and fitted again when the store has changed; another damping
    needs no second fit.

    Args:
        kind: ``"fisher"``, ``"block"`` or ``"none"``.
        damping: relative to the largest eigenvalue, or ``"auto"``.

    Raises:
        ConfigError: the kind is none of these.
        StoreError, FeatureMismatchError, ValueError: as for :meth:`.Curvature.fit`; a file could not be written.
    """
    if kind == "none":
        return None
    if kind not in KINDS:
        raise ConfigError(f"curvature: got {kind!r}; use none, {' or '.join(KINDS)}")
    digest = StoreSource("train", train).digest()
    found = []
    for checkpoint in range(len(train.checkpoints)):
        folder = run.path / FOLDER / train.path.name / f"{kind}-{checkpoint}"
        try:
            one = load(folder, of=digest)
        except StoreError:  # none yet, or not of this store as it is now
            one = None
        if one is None or (damping == "auto" and one.auto is None):
            one = KINDS[kind].fit(train, checkpoint=checkpoint, damping=damping)
            save(one, folder, of=digest)
        found.append(one.with_damping(damping))
    return found
