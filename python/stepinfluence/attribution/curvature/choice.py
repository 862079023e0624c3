"""``curvature=``, ``damping=`` and ``normalize=`` of the functions that score: checked, fitted, and applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from stepinfluence.attribution.curvature.damping import Damping
from stepinfluence.attribution.curvature.fisher import KINDS, Curvature
from stepinfluence.attribution.curvature.length import TrainingTime
from stepinfluence.attribution.curvature.rows import TrainRows
from stepinfluence.attribution.curvature.stored import StoredFeatures, known_progress
from stepinfluence.attribution.curvature.unrolled import Unrolled, segments_of
from stepinfluence.attribution.features import Features

Choice: TypeAlias = Literal["none", "fisher", "block", "source"] | Curvature | Sequence[Curvature] | Unrolled
"""A kind, fitted to each checkpoint's train features; or what was fitted before, one per checkpoint. ``"source"``, and
:class:`.Unrolled`, is of all checkpoints together."""

SOURCE = "source"

Normalize: TypeAlias = Literal["train", "both"] | None
"""Whose features are divided by their norms: all steps of an example by the norm of their sum."""


def one_each(curvature: Choice, count: int) -> list[Choice]:
    """What each of ``count`` checkpoints is corrected with.

    Raises:
        ValueError, TypeError: none of :data:`Choice`, not one per checkpoint, or of all together.
    """
    if isinstance(curvature, Unrolled) or curvature == SOURCE:
        raise ValueError(
            "curvature: SOURCE is of all checkpoints together, and here one is looked at after the other; featurize "
            "them into a store (sdi featurize) and ask that, or fit stepinfluence.curvature.Unrolled to their features"
        )
    if isinstance(curvature, str):
        if curvature != "none" and curvature not in KINDS:
            raise ValueError(
                f"curvature: got {curvature!r}; use 'none', {', '.join(map(repr, KINDS))}, 'source' or a fitted one"
            )
        return [curvature] * count
    given = [curvature] if isinstance(curvature, Curvature) else list(curvature)
    if not all(isinstance(one, Curvature) for one in given):
        raise TypeError("curvature: pass 'none', 'fisher', 'block', or fitted ones, one per checkpoint")
    if len(given) != count:
        raise ValueError(f"curvature: got {len(given)} for {count} checkpoints; give one per checkpoint")
    return list(given)


def fitted(
    train: StoredFeatures | Sequence[Features], curvature: Choice, damping: Damping | None = None
) -> list[Curvature] | Unrolled | None:
    """The curvature of each checkpoint, or SOURCE of all; None for ``"none"``.

    Raises:
        ValueError, TypeError: as for :func:`one_each`, or a damping was given for one that is fitted already, or for
            SOURCE; SOURCE of features in memory, or of a store that does not know how training went. Errors of
            :meth:`.Curvature.fit` and :meth:`.Unrolled.fit` pass through.
    """
    if isinstance(curvature, Unrolled) or curvature == SOURCE:
        return _unrolled(train, curvature, damping)
    stored = isinstance(train, StoredFeatures)
    sides: Sequence[TrainRows] = [train] * len(train.checkpoints) if isinstance(train, StoredFeatures) else train
    chosen = one_each(curvature, len(sides))
    given = [one for one in chosen if isinstance(one, Curvature)]
    if given:
        if damping is not None:
            raise ValueError("damping: this curvature is fitted already; use its with_damping")
        return given
    if curvature == "none":
        if damping is not None:
            raise ValueError("damping: goes with curvature='fisher' or 'block'")
        return None
    kind, asked = KINDS[str(curvature)], "auto" if damping is None else damping
    if isinstance(asked, TrainingTime):
        each: list[Damping] = [asked.at(k, len(sides)) for k in range(len(sides))]
    else:
        each = [asked] * len(sides)
    pairs = zip(sides, each, strict=True)
    return [kind.fit(rows, checkpoint=k if stored else 0, damping=one) for k, (rows, one) in enumerate(pairs)]


def _unrolled(train: StoredFeatures | Sequence[Features], curvature: Choice, damping: Damping | None) -> Unrolled:
    if damping is not None:
        raise ValueError("damping: SOURCE has none: how long training went on is in its segments; leave it out")
    if isinstance(curvature, Unrolled):
        return curvature
    if not isinstance(train, StoredFeatures):
        raise ValueError(
            "curvature: 'source' needs to know how training went, and features in memory do not say; pass the store, "
            "or fit stepinfluence.curvature.Unrolled"
        )
    return Unrolled.fit(train, segments_of(known_progress(train)))


def unit_norm(features: Features) -> Features:
    """Each example's features divided by the norm of their sum over steps: steps still add up. Zeros stay."""
    norms = features.summed().values.norm(dim=1)
    scale = torch.where(norms > 0, norms, torch.ones_like(norms)).reciprocal()
    return replace(features, values=features.values * scale.view(-1, *[1] * (features.values.dim() - 1)))


def corrected(
    train: Sequence[Features],
    query: Sequence[Features],
    *,
    curvature: Choice = "none",
    damping: Damping | None = None,
    normalize: Normalize = None,
) -> tuple[list[Features], list[Features]]:
    """Train and query features, one per checkpoint, whose inner products are the scores that were asked for.

    Args:
        train, query: as they were featurized.
        curvature: see :data:`Choice`; each checkpoint gets its own.
        damping: of a curvature that is fitted here; ``"auto"`` if not given, but a number for normalised rows.
            Features do not know their training's length: a :class:`.TrainingTime` says it, one T per checkpoint.
        normalize: see :data:`Normalize`; a curvature is fitted to the normalised rows.

    Raises:
        ValueError, TypeError, FeatureMismatchError: as for :func:`fitted`; ``normalize`` is none of those, or goes with
            a curvature that was fitted to other rows.
    """
    trains, queries = list(train), list(query)
    if normalize not in (None, "train", "both"):
        raise ValueError(f"normalize: got {normalize!r}; use 'train', 'both' or None")
    if normalize is not None:
        if not isinstance(curvature, str):
            raise ValueError("normalize: goes with curvature='fisher' or 'block', fitted to the normalised rows")
        if curvature == SOURCE:
            raise ValueError("normalize: not offered with SOURCE, whose segments are those of plain gradients")
        trains = [unit_norm(features) for features in trains]
        queries = [unit_norm(features) for features in queries] if normalize == "both" else queries
        if curvature != "none" and (damping in (None, "auto", "training") or isinstance(damping, TrainingTime)):
            raise ValueError(
                "damping: 'auto' chooses badly for normalised rows, and training's length is not theirs "
                "(docs/curvature.md); give a number, such as 1e-2"
            )
    found = fitted(trains, curvature, damping)
    if isinstance(found, Unrolled):
        found.require_fitted_to([features.space for features in trains])
        queries = found.transform(queries[-1])
    elif found is not None:
        queries = [one.transform(features) for one, features in zip(found, queries, strict=True)]
    return trains, queries
