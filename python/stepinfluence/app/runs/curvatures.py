"""The curvatures of a run's train rows, fitted at first use and kept in the run's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from stepinfluence.app.runs.config import CONFIG, RunConfig
from stepinfluence.attribution.curvature import Curvature, Damping, load, save
from stepinfluence.attribution.curvature.choice import KINDS
from stepinfluence.errors import ConfigError, FeatureMismatchError, StoreError
from stepinfluence.search.sources import StoreSource
from stepinfluence.store import Store

FOLDER = "curvature"


def shown_first(run: Path) -> str:
    """The kind of curvature that a run's scores are corrected with where people see them: its ``curvature`` setting.

    Raises:
        ConfigError: ``config.yaml`` cannot be read.
    """
    path = run / CONFIG
    return RunConfig.load(path).curvature if path.is_file() else RunConfig.curvature


def curvatures_if_any(run: Path, train: Store, kind: str) -> tuple[list[Curvature] | None, str]:
    """:func:`kept_curvatures` where nobody asked for them by name: None, and the reason, where there can be none."""
    try:
        return kept_curvatures(run, train, kind), ""
    except (FeatureMismatchError, StoreError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        return None, str(error)


def scores_to_show(
    run: Path, train: Store, kind: str | None, damping: Damping = "auto"
) -> tuple[list[list[Curvature] | None], str]:
    """What people are shown: the curvatures of each score, the one to look at first in front (None: SDI), and why there
    is none where one was wanted.

    Args:
        kind: that score alone; None for the run's, and SDI beside it.
        damping: as for :func:`kept_curvatures`.

    Raises:
        As :func:`kept_curvatures`, for a ``kind`` that was asked for.
    """
    if kind is not None:
        return [kept_curvatures(run, train, kind, damping)], ""
    first, why = curvatures_if_any(run, train, shown_first(run))
    return ([None] if first is None else [first, None]), why


def kept_curvatures(run: Path, train: Store, kind: str, damping: Damping = "auto") -> list[Curvature] | None:
    """The curvature of each checkpoint of a run's store, or None for ``"none"``.

    It is kept in ``RUN/curvature/SPLIT/KIND-CHECKPOINT``, if that can be written, and fitted again when the store has
    changed; another damping needs no second fit.

    Args:
        run: its folder.
        train: one of its stores.
        kind: ``"fisher"``, ``"block"`` or ``"none"``.
        damping: relative to the largest eigenvalue, or ``"auto"``.

    Raises:
        ConfigError: the kind is none of these.
        StoreError, FeatureMismatchError, ValueError: as for :meth:`.Curvature.fit`.
    """
    if kind == "none":
        return None
    if kind not in KINDS:
        raise ConfigError(f"curvature: got {kind!r}; use none, {' or '.join(KINDS)}")
    digest = StoreSource("train", train).digest()
    found = []
    for checkpoint in range(len(train.checkpoints)):
        folder = run / FOLDER / train.path.name / f"{kind}-{checkpoint}"
        try:
            one = load(folder, of=digest)
        except StoreError:  # none yet, or not of this store as it is now
            one = None
        if one is None or (damping == "auto" and one.auto is None):
            one = KINDS[kind].fit(train, checkpoint=checkpoint, damping=damping)
            with suppress(StoreError):  # a run that cannot be written to can be asked all the same
                save(one, folder, of=digest)
        found.append(one.with_damping(damping))
    return found
