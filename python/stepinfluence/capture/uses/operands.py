"""The tensors among a call's arguments, sorted by what they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stepinfluence.capture.body.sources import Provenance, Source
from stepinfluence.errors import UnsupportedUseError

_PLAIN = (tuple, list, torch.Size)


def plain(value: Any) -> Any:
    """Arguments with tuples and lists in place of those of classes derived from them: torch takes both alike."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if not isinstance(value, tuple | list) or type(value) is torch.Size:
        return value
    return (tuple if isinstance(value, tuple) else list)(plain(v) for v in value)


class Operands:
    """What a call is given.

    Attributes:
        sources: target parameters, and tensors computed from them alone.
        data: tensors that the batch has a part in.
        has_constant: whether there are others, made without data.
        only_doubtful: whether no data surely is data, see :class:`Provenance`.
        named: whether some stand in tuples or lists of other classes, such as named tuples.
    """

    def __init__(self, known: Provenance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.sources: list[Source] = []
        self.data: list[Tensor] = []
        self.has_constant = False
        self.only_doubtful = True
        self.named = False
        self._sort(known, args)
        if kwargs:
            self._sort(known, kwargs.values())

    def _sort(self, known: Provenance, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                key = id(value)
                source = known.source_of(key)
                if source is not None:
                    self.sources.append(source)
                elif known.constants.has_id(key):
                    self.has_constant = True
                else:
                    self.data.append(value)
                    self.only_doubtful &= known.doubtful.has_id(key)
            elif isinstance(value, tuple | list):
                self.named |= type(value) not in _PLAIN
                self._sort(known, value)


def in_transform(sources: Iterable[Source]) -> UnsupportedUseError:
    """The error for any use within ``torch.vmap`` or ``torch.func``: whose rows are whose cannot be seen there."""
    names = ", ".join(dict.fromkeys(source.name for source in sources))
    return UnsupportedUseError(
        f"{names}: used inside torch.vmap or torch.func, where examples cannot be told apart; call the module on the "
        "whole batch instead (most modules take leading dimensions as they are)"
    )
