"""The curvatures of a run's train rows, fitted at first use and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stepinfluence.app.runs.config import CONFIG, RunConfig
from stepinfluence.attribution.curvature import Curvature, Damping, load, save
from stepinfluence.attribution.curvature.choice import KINDS
from stepinfluence.attribution.curvature.stored import known_time, of_checkpoint
from stepinfluence.errors import ConfigError, FeatureMismatchError, StoreError
from stepinfluence.search.sources import StoreSource
from stepinfluence.store import Store

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


def score_named(curvature: Sequence[Curvature] | None) -> str:
    """Which score it is, in words."""
    if curvature is None:
        return PLAIN
    what = {"fisher": "the train features' Fisher", "block": "the train features' Fisher by parameter"}
    return f"influence corrected by {what[curvature[0].kind]}, {damping_named(curvature)}"


def curvature_named(curvature: Sequence[Curvature]) -> str:
    """What scores are corrected with, in a few words."""
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
) -> tuple[list[Curvature] | None, str]:
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
) -> tuple[list[list[Curvature] | None], str]:
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


def kept_curvatures(run: Path, train: Store, kind: str, damping: Damping | None = None) -> list[Curvature] | None:
    """The curvature of each checkpoint of a run's store, or None for ``"none"``.

    It is kept in ``RUN/curvature/SPLIT/KIND-CHECKPOINT``, if that can be written, and fitted again when the store has
    changed; another damping needs no second fit.

    Args:
        run: its folder.
        train: one of its stores.
        kind: ``"fisher"``, ``"block"`` or ``"none"``.
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
    if kind not in KINDS:
        raise ConfigError(f"curvature: got {kind!r}; use none, {' or '.join(KINDS)}")
    if damping is None:
        damping = _settings(run)[1] or preferred_damping(train, kind)
    digest = StoreSource("train", train).digest()
    found = []
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
        found.append(one.with_damping(here))
    return found
