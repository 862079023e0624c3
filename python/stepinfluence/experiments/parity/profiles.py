"""Summed influence profiles over all checkpoints, and what they follow (paper D.2, Fig. 1A)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import find_peaks
from scipy.stats import spearmanr

from stepinfluence.experiments.parity.clock import Clock, clock
from stepinfluence.experiments.parity.config import Config
from stepinfluence.experiments.parity.proxy import Array, Integers
from stepinfluence.experiments.parity.statistics import Period, autocorrelation, delay, period
from stepinfluence.tasks.parity import ParityExample


@dataclass(frozen=True)
class Profiles:
    """Influence summed over training examples and checkpoints.

    Attributes:
        probe: of the first probe, ``(T,)``.
        period: of ``probe`` up to the read-out.
        period_by_checkpoint: of its share from each checkpoint.
        share_by_checkpoint: of the absolute profile.
        peaks: 1-based steps of the probe's peaks up to the read-out.
        last_share: of the absolute profile, at the read-out step.
        after: largest absolute score of any pair after the read-out.
        delay: steps by which the margin's increases follow the SDI, tried from -2 to 2.
        delay_correlation: at that delay.
        test_lag: median over test strings of their profiles' autocorrelation at the lag of the cosine.
        probe_lag: the same of the probe.
        test_clock: frequency of the test strings' profiles against their share of ones.
        own: mean self-influence by length, ``{bits: (steps,)}``.
        own_spearman: of a training string's length and its total self-influence.
    """

    probe: Array
    period: Period
    period_by_checkpoint: tuple[int, ...]
    share_by_checkpoint: tuple[float, ...]
    peaks: Integers
    last_share: float
    after: float
    delay: int
    delay_correlation: float
    test_lag: float
    probe_lag: float
    test_clock: Clock
    own: Mapping[int, Array]
    own_spearman: float


def summarise(
    config: Config,
    scores: Sequence[Mapping[str, Any]],
    margin: Array,
    subset: Sequence[ParityExample],
    test: Sequence[ParityExample],
) -> Profiles:
    """Statistics of :meth:`stepinfluence.experiments.parity.influence.Attribution.at`'s arrays.

    Args:
        config: the experiment.
        scores: one result for each checkpoint.
        margin: of the first probe after each step, ``(T,)``.
        subset, test: the strings that were scored.
    """
    n = config.test_length
    parts = [s["probes"][:, 0].astype(np.float64).sum(0) for s in scores]
    probe = np.sum(parts, axis=0)
    sums = np.sum([s["test_sum"].astype(np.float64) for s in scores], axis=0)[:, :n]
    sizes = np.array([np.abs(p).sum() for p in parts])
    # Increase of the margin by step t belongs to step t; the first has none before it.
    shift, correlation = delay(probe[1:n], np.diff(margin[:n]), 2)
    own = np.sum([s["own"].astype(np.float64) for s in scores], axis=0)
    by_length: dict[int, list[Array]] = defaultdict(list)
    for example, row in zip(subset, own, strict=True):
        by_length[example.n_digits].append(row)
    return Profiles(
        probe=probe,
        period=period(probe[:n], seed=config.seed),
        period_by_checkpoint=tuple(period(p[:n], orders=0).lag for p in parts),
        share_by_checkpoint=tuple((sizes / sizes.sum()).tolist()),
        # A last value that is the highest is a peak, too.
        peaks=find_peaks(np.append(probe[:n], -np.inf))[0] + 1,
        last_share=float(np.abs(probe[n - 1]) / np.abs(probe).sum()),
        after=max(_after(s, n) for s in scores),
        delay=shift,
        delay_correlation=correlation,
        test_lag=float(np.median([autocorrelation(row)[config.lag] for row in sums])),
        probe_lag=float(autocorrelation(probe[:n])[config.lag]),
        test_clock=clock(sums, np.array([e.bits.count("1") for e in test]), n),
        own={length: np.mean(rows, axis=0) for length, rows in sorted(by_length.items())},
        own_spearman=float(spearmanr([e.n_digits for e in subset], own.sum(1)).statistic),
    )


def _after(scores: Mapping[str, Any], n: int) -> float:
    return float(max(np.abs(scores["probes"][..., n:]).max(), scores["test_energy"][:, n:].max()))
