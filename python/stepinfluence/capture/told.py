"""A table of the uses of a run: how their rows' owners became known, and what was verified."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from stepinfluence.capture.owners.calls import OUTSIDE
from stepinfluence.capture.owners.rows import Told, Use


@dataclass(frozen=True)
class ToldUse:
    """Uses of one parameter (or of several that are used together) in one operation.

    Attributes:
        parameters: their names.
        operation: the torch function.
        steps: in how many loop steps.
        followed, found: number of batches in which the owners of its rows were followed through the forward pass, and
            in which they were found by gradients.
        verified: number of batches that were run again with losses multiplied, and gave what they should.
    """

    parameters: str
    operation: str
    steps: int
    followed: int
    found: int
    verified: int


class Uses(tuple[ToldUse, ...]):
    """The uses of a run; printed, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("parameters", "operation", "steps", "followed", "found", "verified")
        rows = [head, *(tuple(str(getattr(use, name)) for name in head) for use in self)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


@dataclass
class _Counts:
    steps: set[int] = field(default_factory=set)
    followed: int = 0
    found: int = 0
    verified: int = 0


class Ledger:
    """What is counted for :class:`Uses`, batch by batch."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = {}
        self.followed = self.found = self.verified = 0

    def add(self, uses: Iterable[Use], way: Told) -> set[Hashable]:
        """A batch with these uses; gives a name to what it used."""
        keys: set[Hashable] = set()
        for use in uses:
            if use.step == OUTSIDE:
                continue
            key = use.name, use.operation
            counts = self._counts.setdefault(key, _Counts())
            counts.steps.add(use.step)
            if key not in keys:
                keys.add(key)
                setattr(counts, way, getattr(counts, way) + 1)
        setattr(self, way, getattr(self, way) + 1)
        return keys

    def add_verified(self, keys: set[Hashable]) -> None:
        """A batch with these uses was verified."""
        self.verified += 1
        for key, counts in self._counts.items():
            counts.verified += key in keys

    def table(self) -> Uses:
        return Uses(ToldUse(*key, len(c.steps), c.followed, c.found, c.verified) for key, c in self._counts.items())

    def summary(self) -> str:
        """In a few words."""
        batches = self.followed + self.found
        if not batches:
            return "no batch featurized yet"
        return f"{batches} batches: owners followed in {self.followed}, found in {self.found}; {self.verified} verified"
