"""What a capture has already verified on real gradients, so that a later call does not verify the same again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

Layout: TypeAlias = tuple[str, tuple[int, ...]]
"""A use of a parameter, and the shape in which its examples had to be found."""


class Checked:
    """The ways of telling examples apart that were verified for one loss function in one state."""

    def __init__(self, state: Hashable) -> None:
        self.state = state
        self._layouts: set[Layout] | None = None

    def covers(self, layouts: frozenset[Layout]) -> bool:
        """Whether a batch whose examples were told apart in these ways needs no verification."""
        return self._layouts is not None and layouts <= self._layouts

    def add(self, layouts: frozenset[Layout]) -> None:
        """A batch with these was verified."""
        self._layouts = (self._layouts or set()) | layouts


class Memory:
    """For each loss function that is still alive, what was verified with it in the state it was last used in.

    A loss function is known by its identity, and held weakly: an object that only looks like it, or that has taken the
    place of one that is gone, is another one.
    """

    def __init__(self) -> None:
        self._known: list[tuple[tuple[weakref.ref[Any], ...], Checked]] = []

    def recall(self, loss_fn: Callable[..., Any], state: Hashable, *, anew: bool = False) -> Checked:
        """What was verified with ``loss_fn`` in ``state``; empty at first, in another state, and if ``anew``."""
        # A bound method is a new object each time it is taken from its owner.
        bound = hasattr(loss_fn, "__self__") and hasattr(loss_fn, "__func__")
        parts = (loss_fn.__self__, loss_fn.__func__) if bound else (loss_fn,)
        kept: list[tuple[tuple[weakref.ref[Any], ...], Checked]] = []
        found = Checked(state)
        for references, checked in self._known:
            owners = [reference() for reference in references]
            if len(owners) == len(parts) and all(o is p for o, p in zip(owners, parts, strict=True)):
                found = checked if checked.state == state and not anew else found
            elif all(owner is not None for owner in owners):
                kept.append((references, checked))
        # What cannot be held weakly could not be told from a later object in its place: it is verified every time.
        with contextlib.suppress(TypeError):
            kept.append((tuple(weakref.ref(part) for part in parts), found))
        self._known = kept
        return found
