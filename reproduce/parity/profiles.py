"""Summed influence profiles, and what they follow (paper D.2, Fig. 1A)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import find_peaks
from scipy.stats import spearmanr
from stepinfluence.attribution.periods import Period, autocorrelation, period
from stepinfluence.models.parity_task import ParityExample

from reproduce.arrays import Array, Integers
from reproduce.parity.clock import Clock, clock
from reproduce.parity.config import Config
from reproduce.parity.statistics import delay


@dataclass(frozen=True)
class Profile:
    """Influence on the first probe, summed over training examples and some checkpoints.

    Attributes:
        values: by loop step, ``(T,)``.
        period: up to the read-out.
        peaks: 1-based steps of the local maxima up to the read-out; a last value that is the highest is one.
        last_share: of the absolute profile, at the read-out step.
        delay: steps by which the margin's increases follow, of 0 .. 3.
        delay_correlation: at that delay.
    """

    values: Array
    period: Period
    peaks: Integers
    last_share: float
    delay: int
    delay_correlation: float


def profile_of(values: Array, margin: Array, n: int, seed: int) -> Profile:
    """Statistics of a summed profile.

    Args:
        values, margin: by loop step, ``(T,)``.
        n: read-out step, 1-based.
        seed: of the p-value.
    """
    # Increase of the margin by step t belongs to step t; the first has none before it.
    shift, correlation = delay(values[1:n], np.diff(margin[:n]), range(4))
    return Profile(
        values=values,
        period=period(values[:n], seed=seed),
        peaks=find_peaks(np.append(values[:n], -np.inf))[0] + 1,
        last_share=float(np.abs(values[n - 1]) / np.abs(values).sum()),
        delay=shift,
        delay_correlation=correlation,
    )


@dataclass(frozen=True)
class Profiles:
    """Influence summed over training examples.

    Attributes:
        all: over all checkpoints, as the paper sums.
        trained: over the checkpoints from the end of the curriculum on (the last one if it did not end).
        n_trained: how many these are.
        period_by_checkpoint: of each checkpoint's part.
        share_by_checkpoint: of each in the sum of the parts' absolute values.
        after: largest absolute score of any pair after the read-out, at any checkpoint.
        test_lag, probe_lag: autocorrelation of ``trained`` profiles at the lag of the cosine: median of the random test
            strings, and the probe.
        test_clock: frequency of the test strings' ``trained`` profiles against their share of ones.
        own: mean self-influence over the same checkpoints by length, ``{bits: (steps,)}``.
        own_spearman: of a training string's length and its total self-influence.
    """

    all: Profile
    trained: Profile
    n_trained: int
    period_by_checkpoint: tuple[int, ...]
    share_by_checkpoint: tuple[float, ...]
    after: float
    test_lag: float
    probe_lag: float
    test_clock: Clock
    own: Mapping[int, Array]
    own_spearman: float


def summarise(
    config: Config,
    scores: Sequence[Mapping[str, Any]],
    digits: Sequence[int],
    margin: Array,
    subset: Sequence[ParityExample],
    test: Sequence[ParityExample],
) -> Profiles:
    """Statistics of :meth:`reproduce.parity.influence.Attribution.at`'s arrays.

    Args:
        config: the experiment.
        scores: one result for each checkpoint.
        digits: longest strings mastered at each.
        margin: of the first probe after each step, ``(T,)``.
        subset, test: the strings that were scored.
    """
    n = config.test_length
    done = [k for k, mastered in enumerate(digits) if mastered == config.training.max_digits] or [len(scores) - 1]

    def total(name: str, chosen: Sequence[int]) -> Array:
        return np.asarray(sum(scores[k][name].astype(np.float64) for k in chosen))

    parts = [s["probes"][:, 0].astype(np.float64).sum(0) for s in scores]
    sizes = np.array([np.abs(p).sum() for p in parts])
    sums = total("test_sum", done)[:, :n]
    own = total("own", done)
    by_length: dict[int, list[Array]] = defaultdict(list)
    for example, row in zip(subset, own, strict=True):
        by_length[example.n_digits].append(row)
    trained = profile_of(np.asarray(sum(parts[k] for k in done)), margin, n, config.seed)
    return Profiles(
        all=profile_of(np.asarray(sum(parts)), margin, n, config.seed),
        trained=trained,
        n_trained=len(done),
        period_by_checkpoint=tuple(period(p[:n], orders=0).lag for p in parts),
        share_by_checkpoint=tuple((sizes / sizes.sum()).tolist()),
        after=max(_after(s, n) for s in scores),
        test_lag=float(np.median([autocorrelation(row)[config.lag] for row in sums])),
        probe_lag=float(autocorrelation(trained.values[:n])[config.lag]),
        test_clock=clock(sums, np.array([e.bits.count("1") for e in test]), n),
        own={length: np.mean(rows, axis=0) for length, rows in sorted(by_length.items())},
        own_spearman=float(spearmanr([e.n_digits for e in subset], own.sum(1)).statistic),
    )


def _after(scores: Mapping[str, Any], n: int) -> float:
    return float(max(np.abs(scores["probes"][..., n:]).max(), scores["test_energy"][:, n:].max()))
