"""What a capture has already verified on real gradients, so that a later call does not verify the same again."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from stepinfluence.capture.owners.rows import Told


class Checked:
    """The ways of telling examples apart that were verified for one loss function in one state."""

    def __init__(self, state: Hashable) -> None:
        self.state = state
        self._ways: set[Told] = set()

    def covers(self, way: Told) -> bool:
        """Whether a batch whose examples were told apart in this way needs no verification."""
        return way in self._ways

    def add(self, way: Told) -> None:
        """A batch with this was verified."""
        self._ways.add(way)


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
        parts = (loss_fn.__self__, loss_fn.__func__) if isinstance(loss_fn, types.MethodType) else (loss_fn,)
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
