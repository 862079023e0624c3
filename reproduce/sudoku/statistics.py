"""Statistics of the Sudoku experiment (paper D.3 and D.4), on plain arrays.

``n`` training puzzles, ``q`` test puzzles, ``steps`` loop steps: ``sdi`` is ``(n, q, steps)``, ``tracin`` ``(n, q)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Bin = tuple[int, int]


@dataclass(frozen=True)
class Quartiles:
    """Median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def quartiles(values: Array) -> Quartiles:
    """Median and quartiles of ``values``.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values: got none; the group is empty")
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Quartiles(float(median), float(low), float(high))


def in_bin(blanks: Counts, bounds: Bin) -> Mask:
    """Which puzzles have a number of blanks within the bounds, both included."""
    return (blanks >= bounds[0]) & (blanks <= bounds[1])


def cross_mass(tracin: Array) -> Array:
    """Cross-influence mass of each training puzzle: ``C(z) = sum_z' |TracIn(z, z')|``, ``(n,)``."""
    result: Array = np.abs(tracin).sum(1)
    return result


def energy(sdi: Array, group: Mask | None = None) -> Array:
    """SDI energy of each test puzzle: ``e(t) = sum_z |SDI(z, z')_t|`` over the training group, ``(q, steps)``."""
    result: Array = np.abs(sdi if group is None else sdi[group]).sum(0)
    return result


def shares(tracin: Array, group: Mask) -> Array:
    """Share of each test puzzle's absolute TracIn mass that comes from the training group, ``(q,)``."""
    mass = np.abs(tracin)
    result: Array = mass[group].sum(0) / mass.sum(0)
    return result


def late_mass(energies: Array) -> Array:
    """Fraction of each curve ``(q, steps)`` in the later half of the steps: 17 .. 32 of 32. ``(q,)``."""
    steps = energies.shape[1]
    result: Array = energies[:, (steps + 1) // 2 :].sum(1) / energies.sum(1)
    return result


def centre_of_mass(energies: Array) -> Array:
    """Mean step (from 1) of each curve ``(q, steps)`` taken as a distribution, ``(q,)``."""
    steps = np.arange(1, energies.shape[1] + 1)
    result: Array = (energies * steps).sum(1) / energies.sum(1)
    return result


def crossing_step(energies: Array, level: float = 0.5) -> Counts:
    """First step (from 1) at which each curve's running share reaches ``level``, ``(q,)``."""
    running = energies.cumsum(1) / energies.sum(1, keepdims=True)
    result: Counts = 1 + (running >= level - 1e-12).argmax(1)
    return result


def band(curves: Array) -> tuple[Array, Array, Array]:
    """Lower quartile, median and upper quartile over the rows of ``(q, steps)``, each ``(steps,)``."""
    low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
    return low, median, high


@dataclass(frozen=True)
class Association:
    """Spearman's rank correlation with its two-sided p-value."""

    rho: float
    p: float


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Association:
    """Rank correlation of two samples."""
    result = stats.spearmanr(a, b)
    return Association(float(result.statistic), float(result.pvalue))


def welch(a: Array, b: Array) -> float:
    """Two-sided p-value of Welch's t-test: two groups of puzzles, variances not taken as equal."""
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def paired(a: Array, b: Array) -> float:
    """Two-sided p-value of the paired t-test: two numbers for each test puzzle."""
    return float(stats.ttest_rel(a, b).pvalue)


def memorised_least_but_broad(self_influence: Array, mass: Array) -> int:
    """Puzzles in the bottom quarter of self-influence that are in the top quarter of cross-influence mass."""
    low = self_influence <= np.quantile(self_influence, 0.25)
    return int((low & (mass >= np.quantile(mass, 0.75))).sum())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's)."""
    interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Contrast:
    """Easy and hard training puzzles beside each other, with the p-value of their difference."""

    easy: float
    hard: float
    p: float


@dataclass(frozen=True)
class Table:
    """The paper's Table 1.

    Attributes:
        self_influence, mass: quartiles of the easy and the hard training group.
        self_p, mass_p: Welch's test between them.
        share, late: for each test bin, share of the mass and late energy of the two training groups (paired test).
    """

    self_influence: tuple[Quartiles, Quartiles]
    self_p: float
    mass: tuple[Quartiles, Quartiles]
    mass_p: float
    share: dict[Bin, Contrast]
    late: dict[Bin, Contrast]


def table_one(
    sdi: Array, tracin: Array, self_influence: Array, easy: Mask, hard: Mask, test_blanks: Counts, bins: Sequence[Bin]
) -> Table:
    """Everything in the paper's Table 1.

    Args:
        sdi, tracin: influence of training on test puzzles.
        self_influence: TracIn of each training puzzle on itself, ``(n,)``.
        easy, hard: the two training groups, bool ``(n,)``.
        test_blanks: difficulty of the test puzzles, ``(q,)``.
        bins: of test puzzles, for instance ``[(46, 47), (49, 50)]``.

    Raises:
        ValueError: a group or a bin without puzzles.
    """
    for name, group in (("easy", easy), ("hard", hard)):
        if not group.any():
            raise ValueError(f"{name}: no training puzzle is in this group; choose another bound")
    mass = cross_mass(tracin)
    shared = [shares(tracin, group) for group in (easy, hard)]
    late = [late_mass(energy(sdi, group)) for group in (easy, hard)]

    def contrasts(values: list[Array]) -> dict[Bin, Contrast]:
        found = {}
        for bounds in bins:
            chosen = in_bin(test_blanks, bounds)
            if not chosen.any():
                raise ValueError(f"bins: no test puzzle has {bounds[0]} to {bounds[1]} blanks; choose other bins")
            a, b = values[0][chosen], values[1][chosen]
            found[bounds] = Contrast(float(a.mean()), float(b.mean()), paired(a, b))
        return found

    return Table(
        (quartiles(self_influence[easy]), quartiles(self_influence[hard])),
        welch(self_influence[easy], self_influence[hard]),
        (quartiles(mass[easy]), quartiles(mass[hard])),
        welch(mass[easy], mass[hard]),
        contrasts(shared),
        contrasts(late),
    )
