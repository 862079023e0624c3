"""Numbers read off the stages: what tables, figures and verdicts are made of. Intervals are over models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from stepinfluence.evaluation import Estimate, over_seeds

from reproduce.arrays import Array
from reproduce.base import Result
from reproduce.error.config import FAMILIES, Config
from reproduce.error.statistics import familywise, p_of_mean
from reproduce.fidelity.statistics import loglog_slope

Levels = Sequence[Mapping[str, Any]]
BEYOND = 3.0
"""Standard errors by which a Monte Carlo value must lie above a bound to be said to exceed it."""


def of_models(stages: Sequence[Result], read: Callable[[Any], float]) -> Estimate:
    """A number of each model, with its interval."""
    return over_seeds([read(stage) for stage in stages])


def family_value(level: Mapping[str, Any], hashing: str, name: str) -> float:
    """One number of a level and family; of several sketches their mean."""
    return float(np.mean(level["families"][hashing][name]))


def series(stages: Sequence[Result], hashing: str, name: str) -> list[Estimate]:
    """A number of every level."""
    count = len(stages[0]["levels"])
    return [of_models(stages, lambda s, k=k: family_value(s["levels"][k], hashing, name)) for k in range(count)]  # type: ignore[misc]  # k


def level_slope(stages: Sequence[Result], hashing: str, name: str, axis: str) -> Estimate:
    """Log-log slope of a number on the levels' ``axis``."""

    def one(stage: Result) -> float:
        levels = stage["levels"]
        return loglog_slope([lv[axis] for lv in levels], [family_value(lv, hashing, name) for lv in levels])[0]

    return of_models(stages, one)


def growth(stages: Sequence[Result], hashing: str, name: str, first: int) -> Estimate:
    """A number at the last level over the same at an earlier one."""
    return of_models(
        stages,
        lambda s: family_value(s["levels"][-1], hashing, name) / family_value(s["levels"][first], hashing, name),
    )


def biases(stages: Sequence[Result], levels: Sequence[int]) -> dict[tuple[str, int], list[float]]:
    """For each family and level the bias of each sketch, mean over models: sketches are what is independent here."""
    return {
        (hashing, k): np.mean([s["levels"][k]["families"][hashing]["bias"] for s in stages], axis=0).tolist()
        for hashing in FAMILIES
        for k in levels
    }


def bias_test(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether any of many biases is significant, all tests taken together (Holm, 5 %).

    Returns:
        ``tests``, ``significant``, ``largest`` (mean of largest size) and its interval ``low``, ``high``.
    """
    largest = over_seeds(max(values, key=lambda v: abs(float(np.mean(v)))))
    return {
        "tests": len(values),
        "significant": familywise([p_of_mean(v) for v in values]),
        "largest": largest.value,
        "low": largest.low,
        "high": largest.high,
    }


def above_bound(groups: Sequence[Sequence[Result]]) -> tuple[int, int, float]:
    """How many root mean square errors (mean over models) exceed their bound, of how many, and the largest ratio."""
    ratios = [
        error.value / limit.value
        for stages in groups
        for hashing in FAMILIES
        for error, limit in zip(
            series(stages, hashing, "normalised"), series(stages, hashing, "bound_normalised"), strict=True
        )
    ]
    return sum(r > 1 for r in ratios), len(ratios), max(ratios)


# ----------------------------------------------------------------------------------------------------------------
# Sparsity


def by_structure(masked: Sequence[Result], active: Sequence[Result]) -> dict[str, list[Result]]:
    """Stages that hold the levels of one structure only, by structure."""
    names = dict.fromkeys(level["structure"] for level in masked[0]["levels"])
    parts: dict[str, list[Result]] = {
        name: [{"levels": [lv for lv in s["levels"] if lv["structure"] == name]} for s in masked] for name in names
    }
    return {**parts, "active": list(active)}


# ----------------------------------------------------------------------------------------------------------------
# Lemma 1


def lemma_numbers(stages: Sequence[Result], config: Config) -> dict[str, list[dict[str, Any]]]:
    """For each family and K, over all models, pairs and steps: mean squared error over the right side of eq. 12.

    Returns:
        By family a list over K of ``median``, ``largest`` (ratios to eq. 12), ``own`` (largest ratio to the family's
        bound), ``exceeds`` (how many lie beyond the family's bound by more than Monte Carlo error explains), ``pairs``,
        and ``shared`` (mean squared error over what hashes of each checkpoint's own would give).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for hashing in FAMILIES:
        found[hashing] = []
        for k in range(len(config.lemma.checkpoints)):
            mse, se, own, lemma, alone = (
                [np.asarray(s[name])[k] for s in stages]
                for name in (f"mse_{hashing}", f"se_{hashing}", f"own_{hashing}", "lemma", f"independent_{hashing}")
            )
            ratios = np.concatenate([a / b for a, b in zip(mse, lemma, strict=True)])
            beyond = np.concatenate([a - BEYOND * e > b for a, e, b in zip(mse, se, own, strict=True)])
            found[hashing].append(
                {
                    "median": float(np.median(ratios)),
                    "largest": float(ratios.max()),
                    "own": float(max((a / b).max() for a, b in zip(mse, own, strict=True))),
                    "exceeds": int(beyond.sum()),
                    "pairs": len(ratios),
                    "shared": over_seeds([float(a.sum() / b.sum()) for a, b in zip(mse, alone, strict=True)]),
                }
            )
    return found


# ----------------------------------------------------------------------------------------------------------------
# Nearly orthogonal pairs


def mean_over_draws(stage: Result, name: str) -> Array:
    """``(sizes, candidates)`` from ``(sizes, draws, candidates)``."""
    return np.asarray(np.asarray(stage[name], dtype=np.float64).mean(1))


def recall_table(stages: Sequence[Result], name: str) -> list[list[Estimate]]:
    """Recall by size and number of candidates."""
    tables = np.stack([mean_over_draws(s, name) for s in stages])
    return [[over_seeds(tables[:, i, j]) for j in range(tables.shape[2])] for i in range(tables.shape[1])]


def bin_errors(stages: Sequence[Result], name: str) -> Array:
    """``(sizes, bins)`` of error or bound over the score, root mean square over models; NaN where a bin is empty."""
    squares = np.square(np.stack([np.asarray(s[name], dtype=np.float64) for s in stages]))
    counted = np.isfinite(squares)
    total, count = np.where(counted, squares, 0).sum(0), counted.sum(0)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return np.sqrt(mean)


def size_slope(stages: Sequence[Result], hashing: str, sizes: Sequence[int], bins: Sequence[int]) -> Estimate:
    """Log-log slope of error over score on m: mean over some bins of the cosine."""

    def one(stage: Result) -> float:
        table = np.asarray(stage[f"error_{hashing}"], dtype=np.float64)
        full = [b for b in bins if np.isfinite(table[:, b]).all() and (table[:, b] > 0).all()]
        return float(np.mean([loglog_slope(sizes, table[:, b].tolist())[0] for b in full])) if full else float("nan")

    return of_models(stages, one)


def same_recall(table: Sequence[Sequence[Estimate]], sizes: Sequence[int], size: int, candidates: int) -> int | None:
    """The smallest m whose sketches alone have the recall of ``size`` with re-ranking (columns of ``table``); None
    if no size that was tried has."""
    wanted = table[sizes.index(size)][candidates].value
    reached = [m for m, row in zip(sizes, table, strict=True) if row[0].value >= wanted]
    return min(reached) if reached else None
