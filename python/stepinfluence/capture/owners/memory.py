"""What follows from owners, shapes and arguments alone is the same in every pass: it is worked out once.

Kept for the passes of one capture over batches of one size. Nothing that a tensor's values decide is kept: owners that
an index or a mask made are of their own pass, and so is all that follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from stepinfluence.capture.owners.intervals import Owners

MOST_ENTRIES = 1 << 14
"""Of one memory: a few hundred shapes of a large model. A fuller one makes way for an empty one in the next pass."""

MOST_SIZES = 4
"""Memories that a capture has at a time."""


class Memory:
    """Owners that last beyond a pass, and what follows from them.

    Attributes:
        made: what was made of them, by function, owners and arguments.
        outcomes: of whole calls, by all that decides them (:mod:`stepinfluence.capture.uses.recall`).
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, Any] = {}
        self.outcomes: dict[Hashable, Any] = {}
        self._lasting: dict[int, Owners] = {}
        self._plain: dict[Hashable, Owners] = {}
        # Asked for every operand of every torch call of the model: a bound method, no indirection.
        self.lasts = self._lasting.__contains__

    def __len__(self) -> int:
        return max(len(self.made), len(self.outcomes), len(self._lasting))

    def keep(self, made: Any) -> None:
        """Let owners last, one object or several: they follow from others that do."""
        for owners in made if isinstance(made, list | tuple) else (made,):
            if isinstance(owners, Owners):
                self._lasting[id(owners)] = owners

    def one_of(self, owners: Owners) -> Owners:
        """The one object for owners along a dimension that stands for all that say the same."""
        return self.plain((owners.shape, owners.along, owners.lo.device), lambda: owners)

    def along_dim(self, shape: Sequence[int], dim: int, device: torch.device) -> Owners:
        """The index along ``dim`` is the example."""
        return self.plain((tuple(shape), dim, device), lambda: Owners.along_dim(shape, dim, device))

    def same(self, shape: Sequence[int], owner: tuple[int, int], device: torch.device) -> Owners:
        """One interval for all elements."""
        return self.plain((tuple(shape), owner, device), lambda: Owners.same(shape, owner, device))

    def plain(self, key: Hashable, make: Callable[[], Owners]) -> Owners:
        """Owners that follow from a key alone, which must name all that they are made from."""
        found = self._plain.get(key)
        if found is None:
            found = self._plain[key] = make()
            self._lasting[id(found)] = found
        return found


class Memories:
    """The memories of a capture, by batch size and by what else its passes differ in."""

    def __init__(self) -> None:
        self._of: dict[Hashable, Memory] = {}

    def of(self, *key: Hashable) -> Memory:
        """That of passes with this key."""
        found = self._of.get(key)
        if found is None or len(found) > MOST_ENTRIES:
            if len(self._of) >= MOST_SIZES:
                self._of.clear()
            found = self._of[key] = Memory()
        return found
