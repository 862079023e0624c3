"""The curvatures of a run's train rows, fitted at first use and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from stepinfluence.app.runs.config import CONFIG, RunConfig
from stepinfluence.attribution.curvature import Curvature, Damping, Unrolled, load, save, segments_of
from stepinfluence.attribution.curvature.choice import SOURCE, fitted
from stepinfluence.attribution.curvature.fisher import KINDS
from stepinfluence.attribution.curvature.kept import load_unrolled, save_unrolled
from stepinfluence.attribution.curvature.stored import known_progress, known_time, of_checkpoint
from stepinfluence.errors import ConfigError, FeatureMismatchError, StoreError
from stepinfluence.search.sources import StoreSource
from stepinfluence.store import Store

Correction: TypeAlias = Sequence[Curvature] | Unrolled
"""What scores are corrected with: a curvature for each checkpoint, or SOURCE."""

FOLDER = "curvature"
PLAIN = "SDI (eq. 5), without curvature"


def _settings(run: Path) -> tuple[str, Damping | None]:
    """What a run's scores are corrected with where people see them: its settings ``curvature`` and ``damping``.

    Raises:
        ConfigError: ``config.yaml`` cannot be read.
    """
    path = run / CONFIG
    found: RunConfig | type[RunConfig] = RunConfig.load(path) if path.is_file() else RunConfig
    return found.curvature, found.damping


def damping_named(curvature: Sequence[Curvature]) -> str:
    """The dampings of a store's checkpoints in words, relative to the largest eigenvalues."""
    numbers = [f"{one.damping:.2g}" + (" (auto)" if one.damping == one.auto else "") for one in curvature]
    if all(one.time is not None for one in curvature):
        return f"damping from training's length ({', '.join(numbers)})"
    return f"damping {', '.join(numbers)}"


def score_named(curvature: Correction | None) -> str:
    """Which score it is, in words."""
    if curvature is None:
        return PLAIN
    if isinstance(curvature, Unrolled):
        return f"influence through training by SOURCE, in {len(curvature.segments)} segments"
    what = {"fisher": "the train features' Fisher", "block": "the train features' Fisher by parameter"}
    return f"influence corrected by {what[curvature[0].kind]}, {damping_named(curvature)}"


def curvature_named(curvature: Correction) -> str:
    """What scores are corrected with, in a few words."""
    if isinstance(curvature, Unrolled):
        return f"SOURCE, {len(curvature.segments)} segments"
    what = {"fisher": "Fisher", "block": "Fisher by parameter"}[curvature[0].kind]
    if all(one.time is not None for one in curvature):
        return f"{what}, damping from training's length"
    if all(one.damping == one.auto for one in curvature):
        return f"{what}, damping auto"
    return f"{what}, {damping_named(curvature)}"


def preferred_damping(train: Store, kind: str = "fisher") -> Damping:
    """Training's length for a Fisher of all columns where the store knows it, else ``"auto"``: what predicts retraining
    better (docs/curvature.md; by parameter, training's length was not seen to)."""
    if kind != "fisher":
        return "auto"
    try:
        return known_time(train)
    except ValueError:
        return "auto"


def curvatures_to_show(
    run: Path, train: Store, kind: str | None = None, damping: Damping | None = None
) -> tuple[Correction | None, str]:
    """The curvatures of the score that people are shown first: None for SDI, and why where another one was wanted.

    Args:
        kind, damping: as for :func:`kept_curvatures`; the run's own, if not given.

    Raises:
        As :func:`kept_curvatures`, for what was asked for by name. Where nothing was, the reason is told instead.
    """
    asked = kind is not None or damping is not None
    try:
        return kept_curvatures(run, train, _settings(run)[0] if kind is None else kind, damping), ""
    except (FeatureMismatchError, StoreError, ValueError) as error:
        if asked or isinstance(error, ConfigError):
            raise
        return None, str(error)


def scores_to_show(
    run: Path, train: Store, kind: str | None, damping: Damping | None = None
) -> tuple[list[Correction | None], str]:
    """What people are shown: the curvatures of each score, the one to look at first in front (None: SDI), and why there
    is none where one was wanted.

    Args:
        kind: that score alone; None for the run's, and SDI beside it.
        damping: as for :func:`curvatures_to_show`.

    Raises:
        As :func:`curvatures_to_show`.
    """
    first, why = curvatures_to_show(run, train, kind, damping)
    if kind is not None:
        return [first], ""
    return ([None] if first is None else [first, None]), why


def _kept_source(run: Path, train: Store, damping: Damping | None) -> Unrolled:
    digest = StoreSource("train", train).digest()
    folder = run / FOLDER / train.path.name / SOURCE
    if damping is None:
        segments = segments_of(known_progress(train))
        with suppress(StoreError):  # none yet, or not of this store as it is now
            kept = load_unrolled(folder, of=digest)
            if kept.segments == tuple(segments):
                return kept
    found = fitted(train, "source", damping)
    assert isinstance(found, Unrolled)
    with suppress(StoreError):  # a run that cannot be written to can be asked all the same
        save_unrolled(found, folder, of=digest)
    return found


def kept_curvatures(run: Path, train: Store, kind: str, damping: Damping | None = None) -> Correction | None:
    """The curvature of each checkpoint of a run's store, SOURCE of all, or None for ``"none"``.

    A curvature is kept in ``RUN/curvature/SPLIT/KIND-CHECKPOINT`` (SOURCE in ``source``), if that can be written, and
    fitted again when the store has changed; another damping needs no second fit.

    Args:
        run: its folder.
        train: one of its stores.
        kind: ``"fisher"``, ``"block"``, ``"source"`` or ``"none"``.
        damping: relative to the largest eigenvalue, ``"auto"``, ``"training"`` or a :class:`.TrainingTime`;
            the run's setting, or else :func:`preferred_damping`, if not given.

    Raises:
        ConfigError: the kind is none of these; a damping for ``"none"``.
        StoreError, FeatureMismatchError, ValueError: as for :meth:`.Curvature.fit`.
    """
    if kind == "none":
        if damping is not None:
            raise ConfigError("damping: goes with curvature fisher or block, and what is asked for is none (SDI)")
        return None
    if kind == SOURCE:
        return _kept_source(run, train, damping)
    if kind not in KINDS:
        raise ConfigError(f"curvature: got {kind!r}; use none, {', '.join(KINDS)} or source")
    if damping is None:
        damping = _settings(run)[1] or preferred_damping(train, kind)
    digest = StoreSource("train", train).digest()
    each = []
    for checkpoint in range(len(train.checkpoints)):
        here: Damping = of_checkpoint(train, checkpoint, damping)
        folder = run / FOLDER / train.path.name / f"{kind}-{checkpoint}"
        try:
            one = load(folder, of=digest)
        except StoreError:  # none yet, or not of this store as it is now
            one = None
        if one is None or (here == "auto" and one.auto is None):
            one = KINDS[kind].fit(train, checkpoint=checkpoint, damping=here)
            with suppress(StoreError):  # a run that cannot be written to can be asked all the same
                save(one, folder, of=digest)
        each.append(one.with_damping(here))
    return each
