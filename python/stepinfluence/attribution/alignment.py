"""Rows of several passes over one loader, brought together: by ids where there are some, or not at all.

Influence is summed over checkpoints row by row, so row k must be the same example at each of them. A loader that draws
a new order, or that can be gone through only once, gives other rows the second time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from stepinfluence.attribution.features import Features
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.loaders import is_one_shot, random_sampler


def require_repeatable(loader: Any, side: str, *, has_ids: bool) -> None:
    """Before a loader is gone through more than once.

    Raises:
        FeatureMismatchError: it is an iterator, or draws a new order each time and there are no ids.
    """
    if is_one_shot(loader):
        raise FeatureMismatchError(
            f"{side}: got an iterator ({type(loader).__name__}), which gives its batches once; gone through again it "
            "would give different examples, or none; pass a list of batches or a DataLoader"
        )
    sampler = random_sampler(loader)
    if sampler is not None and not has_ids:
        raise FeatureMismatchError(
            f"{side}: its loader draws a new order each time it is gone through ({sampler}), and rows of different "
            "examples would be added; pass shuffle=False, or ids= to tell the examples apart"
        )


def places_of(
    side: str,
    ids: Sequence[Hashable],
    content: Sequence[int],
    first_ids: Sequence[Hashable],
    first_content: Sequence[int],
) -> list[int] | None:
    """Where the rows of a first pass are found in another one; None where they are the same.

    Args:
        content: of the rows, see :attr:`Features.content`; compared where both have it.

    Raises:
        FeatureMismatchError: the passes are of different examples, or an order cannot be told.
    """
    if tuple(ids) == tuple(first_ids):
        if content and first_content and tuple(content) != tuple(first_content):
            row = next(k for k, (a, b) in enumerate(zip(content, first_content, strict=True)) if a != b)
            raise FeatureMismatchError(
                f"{side}: the loader gave other examples, or the same in another order, at another checkpoint (row "
                f"{row} is the first that differs); give it a fixed order, or pass ids= to tell the examples apart"
            )
        return None
    if content or first_content or len(ids) != len(first_ids):
        raise FeatureMismatchError(
            f"{side}: the checkpoints' features are of different examples ({len(first_ids)} and {len(ids)} rows, ids "
            "differ); featurize the same ones at each"
        )
    place = {value: k for k, value in enumerate(ids)}
    if place.keys() != set(first_ids):
        other = next(i for i in first_ids if i not in place) if set(first_ids) - place.keys() else None
        shown = f"{other!r} is missing at one of them" if other is not None else "ids differ"
        raise FeatureMismatchError(f"{side}: the checkpoints' features are of different examples ({shown})")
    if len(place) < len(ids):
        raise FeatureMismatchError(
            f"{side}: the checkpoints' features are in different orders, and ids that occur twice cannot be matched; "
            "give every example an id of its own"
        )
    return [place[value] for value in first_ids]


def aligned_to(first: Features, other: Features, side: str) -> Features:
    """``other`` with its rows in the order of ``first``'s.

    Raises:
        FeatureMismatchError: as for :func:`places_of`.
    """
    places = places_of(side, other.ids, other.content, first.ids, first.content)
    return other if places is None else other.select(places)
