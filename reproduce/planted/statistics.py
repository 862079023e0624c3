"""Statistics of the experiment, on plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from reproduce.arrays import Array, Bools


@dataclass(frozen=True)
class Tested:
    """A statistic, what it is when nothing is aligned (mean over permutations), and its one-sided p-value."""

    value: float
    null: float
    p: float


def rank_biserial(scores: Array, critical: Bools) -> float:
    """Rank-biserial correlation of scores with a yes/no truth: ``2 AUC - 1``, from -1 to 1, 0 by chance.

    Unlike Spearman's coefficient with such a truth it can reach 1.
    """
    return 2.0 * float(roc_auc_score(critical, scores)) - 1.0


def balanced_spearman(scores: Array, critical: Bools, rng: np.random.Generator, *, draws: int = 20) -> float:
    """Spearman correlation of scores with a yes/no truth, among the critical examples and as many others.

    Mean over ``draws`` random choices of the others. Because half of the truth is tied, a perfect ranking gives
    :func:`balanced_spearman_ceiling`, about 0.9, not 1.
    """
    chosen, others = np.flatnonzero(critical), np.flatnonzero(~critical)
    values = []
    for _ in range(draws):
        pool = np.concatenate([chosen, rng.choice(others, len(chosen), replace=False)])
        values.append(float(stats.spearmanr(scores[pool], critical[pool].astype(float)).statistic))
    return float(np.mean(values))


def balanced_spearman_ceiling(critical: int, *, equal: bool) -> float:
    """What :func:`balanced_spearman` gives for a perfect ranking, with ``critical`` critical examples.

    Args:
        critical: how many.
        equal: they have the same score, as copies of one example have; otherwise no two scores are the same.
    """
    scores = np.arange(2 * critical)
    return float(stats.spearmanr(np.minimum(scores, critical) if equal else scores, scores >= critical).statistic)


def profile_correlation(energy: Array, changes: Array) -> float:
    """Spearman correlation over steps of influence energy with changes of the state, mean over queries.

    Args:
        energy, changes: ``(queries, steps)``. Queries for which one of them is the same at all steps are left out.

    Returns:
        NaN if no query is left.
    """
    kept = (np.ptp(energy, axis=1) > 0) & (np.ptp(changes, axis=1) > 0)
    if not kept.any():
        return float("nan")
    left, right = (_centred(stats.rankdata(x[kept], axis=1)) for x in (energy, changes))
    return float(np.mean((left * right).sum(1) / np.sqrt((left**2).sum(1) * (right**2).sum(1))))


def peak_alignment(energy: Array, changes: Array) -> float:
    """Share of queries whose largest energy is at a step with the most changes.

    Queries whose changes are the same at all steps are left out; NaN if none is left.
    """
    kept = np.ptp(changes, axis=1) > 0
    if not kept.any():
        return float("nan")
    most = changes[kept] == changes[kept].max(1, keepdims=True)
    return float(most[np.arange(len(most)), energy[kept].argmax(1)].mean())


def residual_correlation(energy: Array, changes: Array) -> float:
    """Correlation of energy with changes beyond what all queries have in common at a step.

    Energies are taken as shares of their query's sum; the mean over queries is then taken from each step, of energies
    and of changes; Pearson over all (query, step) pairs. NaN if nothing varies.
    """
    shares = energy / energy.sum(1, keepdims=True)
    left, right = shares - shares.mean(0), changes - changes.mean(0)
    if not (left.any() and right.any()):
        return float("nan")
    return float(stats.pearsonr(left.ravel(), right.ravel()).statistic)


def permutation_test(
    statistic: Callable[[Array, Array], float],
    energy: Array,
    changes: Array,
    *,
    over: str,
    resamples: int,
    rng: np.random.Generator,
) -> Tested:
    """Is a statistic of (energy, changes) larger than when they do not belong together?

    Args:
        statistic: of two ``(queries, steps)`` arrays.
        energy, changes: those.
        over: ``"queries"``: each query's energy meets another query's changes, which keeps what all queries share (such
            as energy that grows with the step); ``"steps"``: the steps of each query are shuffled.
        resamples: permutations.
        rng: source of them.

    Raises:
        ValueError: unknown ``over``.
    """
    if over not in ("queries", "steps"):
        raise ValueError(f"over: got {over!r}; use 'queries' or 'steps'")
    value = statistic(energy, changes)
    null = np.array(
        [
            statistic(energy, rng.permutation(changes) if over == "queries" else rng.permuted(changes, axis=1))
            for _ in range(resamples)
        ]
    )
    # With a tolerance: sums in another order must not count as smaller than an equal value.
    return Tested(value, float(np.mean(null)), (1 + int((null >= value - 1e-12).sum())) / (1 + resamples))


def two_way_interval(values: Array, *, resamples: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean of ``(seeds, queries)`` values with a 95 % percentile interval; both axes are resampled.

    Returns:
        Mean, low end, high end.
    """
    rows = rng.integers(values.shape[0], size=(resamples, values.shape[0]))
    columns = rng.integers(values.shape[1], size=(resamples, values.shape[1]))
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval(values: Array, *, resamples: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean of independent values ``(n,)`` with a 95 % percentile bootstrap interval: mean, low end, high end."""
    if len(values) < 2 or np.ptp(values) == 0:  # scipy refuses what does not vary
        return (float(np.mean(values)),) * 3
    found = stats.bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", random_state=rng)
    low, high = found.confidence_interval
    return float(np.mean(values)), float(low), float(high)


def auc_interval(
    scores: Array, positive: Bools, *, resamples: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Area under the ROC curve with a 95 % percentile interval; positives and negatives are resampled apart."""
    yes, no = scores[positive], scores[~positive]
    # AUC is the share of pairs in the right order; ties count half.
    order = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    rows = rng.integers(len(yes), size=(resamples, len(yes)))
    columns = rng.integers(len(no), size=(resamples, len(no)))
    values = [order[r][:, c].mean() for r, c in zip(rows, columns, strict=True)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(roc_auc_score(positive, scores)), float(low), float(high)


def _centred(x: Array) -> Array:
    centred: Array = x - x.mean(1, keepdims=True)
    return centred
