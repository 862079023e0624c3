"""A campaign: how it prepares, and what it does with one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

from bench.attack.verdicts import Verdict

Attack: TypeAlias = Callable[[Random], Verdict]
"""Makes one input from a generator of its own, and judges what comes of it."""


@dataclass(frozen=True)
class Campaign:
    """One kind of attack.

    Attributes:
        name: how it is called on the command line, and in ``--replay NAME:SEED``.
        what: in words.
        share: of the minutes.
        prepare: makes in an empty folder what is attacked; gives the attack.
        mutated: whether its inputs are mutated files, requests or arguments (else processes that are disturbed).
    """

    name: str
    what: str
    share: float
    prepare: Callable[[Path], Attack]
    mutated: bool = True
