"""What every part of the library takes: loss functions, ids of examples, and loaders of any kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch) -> (B,)``: one loss per example, not reduced over the batch."""

IdsOf: TypeAlias = Callable[[Any], Sequence[Hashable]]
"""``ids(batch)``: one per example."""

RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def random_sampler(loader: Any) -> str | None:
    """The name of a loader's sampler, if it draws a new order each time the loader is iterated."""
    if not isinstance(loader, DataLoader):
        return None
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return next((type(s).__name__ for s in samplers if isinstance(s, RANDOM_SAMPLERS)), None)


def ids_in(batch: Any, ids: IdsOf | None) -> list[Hashable] | None:
    """The ids of a batch, where there is a function for them.

    Raises:
        TypeError: no list of ids, or one that cannot be hashed.
    """
    if ids is None or (given := ids(batch)) is None:
        return None
    # A tensor's elements would be tensors, which are hashed by identity.
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"ids: got {type(given).__name__} {given!r} for a batch; give one id for each of its examples")
    listed = given.tolist() if isinstance(given, Tensor) else list(given)
    for one in listed:
        try:
            hash(one)
        except TypeError:
            raise TypeError(
                f"ids: got {type(one).__name__} {one!r} for an example; give what can be hashed (a number, a text)"
            ) from None
    return listed


def is_one_shot(loader: Any) -> bool:
    """Whether a loader is an iterator (a generator, ``iter(...)``, ``map``): it gives its batches once."""
    return hasattr(loader, "__next__") and iter(loader) is loader
