"""Figures of merit of attribution scores, with confidence intervals.

Scores are ``(n_train, n_query)``; positive = training on the example lowers the query's loss. Outcomes are losses, so a
good score *falls* with them: signs are turned here, and 1 is best everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Likes = npt.ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval, ``low <= value <= high`` as far as its method can tell."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    values: Likes,
    statistic: Callable[[Array], float] | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap over the rows of ``values`` (queries, examples or seeds), NaN rows left out.

    Args:
        values: ``(n, ...)``.
        statistic: of resampled rows; the mean of everything if not given.
        confidence: of the interval.
        draws: resamples.
        seed: of the resampling.

    Returns:
        NaN throughout where there is no row.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array.reshape(len(array), -1)).any(1)]
    if not len(array):
        return Estimate(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    if statistic is None:
        by_row = array.reshape(len(array), -1).mean(1)
        resampled = by_row[rng.integers(0, len(array), (draws, len(array)))].mean(1)
        value = float(by_row.mean())
    else:
        resampled = np.array([statistic(array[rng.integers(0, len(array), len(array))]) for _ in range(draws)])
        value = float(statistic(array))
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def over_seeds(values: Likes, *, confidence: float = 0.95) -> Estimate:
    """Mean over seeds with Student's interval; a seed whose figure is unknown (NaN) is left out.

    With five seeds the interval is 2.8 standard errors to either side (four degrees of freedom) where a large sample
    would have 2.0. A bootstrap over five values is no way around that: its intervals are too narrow.

    Args:
        values: ``(n_seeds,)``: one figure a seed, from runs that share no training.
        confidence: of the interval.

    Returns:
        NaN for the interval of a single seed, which says nothing of other seeds, and throughout where there is none.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Estimate(float(known[0]) if len(known) else np.nan, np.nan, np.nan)
    mean = float(known.mean())
    reach = float(stats.t.ppf((1 + confidence) / 2, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    return Estimate(mean, mean - reach, mean + reach)


def share_over_seeds(values: Likes) -> Estimate:
    """Mean over seeds of shares, with the exact 95 % binomial interval (Clopper and Pearson) of one trial a seed.

    Student's interval would leave 0 to 1, and have no width where no seed has a case, which is not certainty. What is
    counted several times in a seed counts once here, as it shares that seed's model.

    Args:
        values: ``(n_seeds,)``, from 0 to 1; NaN is left out.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    n, cases, tail = len(known), float(known.sum()), (1 - 0.95) / 2
    if not n:
        return Estimate(np.nan, np.nan, np.nan)
    low = float(stats.beta.ppf(tail, cases, n - cases + 1)) if cases > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, cases + 1, n - cases)) if cases < n else 1.0
    return Estimate(cases / n, low, high)


def agreement(outcomes: Likes, correlation: Callable[[Array, Array], float] | None = None) -> Array:
    """How far repeats of a measurement agree: what the best of scores can reach is limited by it.

    Args:
        outcomes: ``(repeats, n, n_query)``: losses, or changes of the loss, of the same n trainings from other
            initialisations.
        correlation: of two rows of n; rank correlation if not given.

    Returns:
        ``(n_query,)``: mean over pairs of repeats; 1 where repeats agree, 0 where they have nothing in common, NaN
        where nothing varies.

    Raises:
        ValueError: fewer than two repeats.
    """
    all_ = np.asarray(outcomes, float)
    if all_.ndim != 3 or len(all_) < 2:
        raise ValueError(f"outcomes: got shape {all_.shape}; give (repeats, n, n_query) of at least two repeats")
    rule = correlation or _spearman
    pairs = [(a, b) for k, a in enumerate(all_) for b in all_[k + 1 :]]
    return np.array([np.mean([rule(a[:, q], b[:, q]) for a, b in pairs]) for q in range(all_.shape[2])])


def linear_datamodeling_score(scores: Likes, losses: Likes, subsets: npt.ArrayLike) -> Array:
    """LDS of each query (Park et al., TRAK, 2023): rank correlation, over models retrained on subsets, of the summed
    scores of the subset with how low the query's loss came out.

    Args:
        scores: ``(n_train, n_query)``.
        losses: ``(n_subsets, n_query)``: the query's loss of the model retrained on each subset.
        subsets: ``(n_subsets, n_train)`` bool: which examples each was trained on.

    Returns:
        ``(n_query,)``, 1 is best; NaN where a query's scores or losses do not vary.

    Raises:
        ValueError: shapes do not fit, or fewer than three subsets.
    """
    scores_, losses_, chosen = np.asarray(scores, float), np.asarray(losses, float), np.asarray(subsets, bool)
    if chosen.ndim != 2 or chosen.shape[1] != len(scores_) or losses_.shape != (len(chosen), scores_.shape[1]):
        raise ValueError(
            f"subsets, losses: got {chosen.shape} and {losses_.shape} for scores {scores_.shape}; "
            "give (n_subsets, n_train) and (n_subsets, n_query)"
        )
    if len(chosen) < 3:
        raise ValueError(f"subsets: got {len(chosen)}; a rank correlation needs at least 3")
    predicted = chosen @ scores_
    return np.array([_spearman(predicted[:, q], -losses_[:, q]) for q in range(scores_.shape[1])])


def leave_one_out_correlation(scores: Likes, changes: Likes, removed: npt.ArrayLike) -> Array:
    """Correlation (Pearson's) of scores with what leaving single examples out does to each query.

    Args:
        scores: ``(n_train, n_query)``.
        changes: ``(n_removed, n_query)``: loss after retraining without the example, minus the loss with it.
        removed: ``(n_removed,)`` rows of the examples left out.

    Returns:
        ``(n_query,)``, 1 is best; NaN where nothing varies.

    Raises:
        ValueError: shapes do not fit.
    """
    rows, changed = np.asarray(removed), np.asarray(changes, float)
    taken = np.asarray(scores, float)[rows]
    if changed.shape != taken.shape:
        raise ValueError(f"changes: got {changed.shape}; give {taken.shape}, a row for each example left out")
    return np.array([pearson(taken[:, q], changed[:, q]) for q in range(taken.shape[1])])


def mislabel_auc(suspicion: Likes, mislabelled: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Area under the ROC curve of finding mislabelled examples by a suspicion such as self-influence; 0.5 is chance.

    Raises:
        ValueError: all examples are mislabelled, or none is.
    """
    pairs = np.stack([np.asarray(suspicion, float), np.asarray(mislabelled, float)], 1)
    if len(set(pairs[:, 1])) != 2:
        raise ValueError("mislabelled: all examples are alike; plant some errors, and not in all examples")

    def auc(rows: Array) -> float:
        wrong = rows[:, 1] > 0
        count, others = int(wrong.sum()), int((~wrong).sum())
        if not count or not others:
            return float("nan")
        above = stats.rankdata(rows[:, 0])[wrong].sum() - count * (count + 1) / 2  # Mann and Whitney's U, ties by half
        return float(above / (count * others))

    return bootstrap(pairs, auc, draws=500, seed=seed)


def top_k_overlap(scores: Likes, other: Likes, k: int) -> Array:
    """Share of the k most helpful examples that two scores have in common, for each query ``(n_query,)``; NaN where
    either has no scores (NaN).

    Raises:
        ValueError: shapes differ, or k is out of range.
    """
    a, b = np.asarray(scores, float), np.asarray(other, float)
    if a.shape != b.shape:
        raise ValueError(f"other: got {a.shape} for scores {a.shape}; compare scores of the same examples")
    if not 1 <= k <= len(a):
        raise ValueError(f"k: got {k}; use 1 to {len(a)}")
    tops = [np.argsort(-x, axis=0, kind="stable")[:k] for x in (a, b)]
    shares = np.array([len(set(tops[0][:, q]) & set(tops[1][:, q])) / k for q in range(a.shape[1])])
    found: Array = np.where(np.isnan(a + b).any(0), np.nan, shares)
    return found


def randomization_check(scores: Likes, of_random_weights: Likes) -> Array:
    """Rank correlation of scores with those of an untrained model, for each query (after Adebayo et al., 2018).

    Near 1, the scores say nothing about what was learnt.
    """
    a, b = np.asarray(scores, float), np.asarray(of_random_weights, float)
    return np.array([_spearman(a[:, q], b[:, q]) for q in range(a.shape[1])])


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation; NaN where nothing varies."""
    return float(stats.pearsonr(a, b)[0]) if a.std() > 0 and b.std() > 0 else float("nan")


def _spearman(a: Array, b: Array) -> float:
    if not (np.ptp(a) > 0 and np.ptp(b) > 0):  # nothing varies, or there are no scores (NaN)
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)
