"""Statistics of one model's forward pass: period, recurrence, discrete states, proxy circuit (paper section 4, D.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from stepinfluence.attribution.periods import Period, period

from reproduce.arrays import Array, Integers
from reproduce.parity.config import Config
from reproduce.parity.proxy import ProxyCircuit, Scored, score
from reproduce.parity.statistics import (
    determinism,
    dominant_cycle,
    lagged_cosine,
    transition_matrix,
)


@dataclass(frozen=True)
class Readings:
    """What one trained model shows.

    Attributes:
        accuracy: on held-out strings of the test length.
        margin: logit margin of the first probe after each step, true parity minus the other, ``(T,)``.
        margin_period: of ``margin``.
        cosine: mean cosine of states ``lag`` steps apart, by lag from 1.
        plane: first two principal components of the probe's states, ``(T, 2)``.
        explained: share of their variance in these two.
        states: k-means state after each step, numbered in order of the first visit, ``(T,)``.
        silhouette: of k-means by k.
        matrix: transitions, ``(k, k)``.
        determinism: share of transitions that are their state's likeliest.
        cycle: the states of the dominant cycle.
        proxy: the circuit.
        scores: how it does, by set of strings.
    """

    accuracy: float
    margin: Array
    margin_period: Period
    cosine: Mapping[int, float]
    plane: Array
    explained: float
    states: Integers
    silhouette: Mapping[int, float]
    matrix: Array
    determinism: float
    cycle: tuple[int, ...]
    proxy: ProxyCircuit
    scores: Mapping[str, Scored]


def read(found: Mapping[str, Any], config: Config, seed: int) -> Readings:
    """Statistics of :func:`reproduce.parity.measure.forward`'s arrays.

    Args:
        found: the arrays.
        config: the experiment.
        seed: of k-means.
    """
    n = config.test_length
    hidden = found["probe_hidden"][0]
    sign = 2 * (n // 2 % 2) - 1  # 0101... of n bits has n // 2 ones
    margin = sign * found["probe_difference"][0]
    learn = found["calibration"]
    proxy = ProxyCircuit.fit(
        hidden, found["every_hidden"][learn], found["every_parity"][learn],
        states=config.states, quantile=config.quantile, seed=seed,
    )  # fmt: skip
    states = proxy.assign(hidden)[0]
    matrix = transition_matrix(states, config.states)
    components = PCA(2, random_state=seed).fit(hidden)
    return Readings(
        accuracy=float((found["test_answers"] == found["test_parity"]).mean()),
        margin=margin,
        margin_period=period(margin, seed=seed),
        cosine={lag: float(lagged_cosine(hidden, lag).mean()) for lag in range(1, 2 * config.lag + 1) if lag < n},
        plane=components.transform(hidden),
        explained=float(components.explained_variance_ratio_.sum()),
        states=states,
        silhouette=_silhouettes(hidden, seed),
        matrix=matrix,
        determinism=determinism(states, config.states),
        cycle=dominant_cycle(matrix),
        proxy=proxy,
        scores=_scores(found, config, proxy, seed),
    )


def _silhouettes(hidden: Array, seed: int) -> dict[int, float]:
    counts = range(2, min(9, len(hidden)))
    return {
        k: float(silhouette_score(hidden, KMeans(k, n_init=20, random_state=seed).fit_predict(hidden))) for k in counts
    }


def _scores(found: Mapping[str, Any], config: Config, proxy: ProxyCircuit, seed: int) -> dict[str, Scored]:
    top = config.training.max_digits

    def on(name: str, rows: Integers, by: ProxyCircuit = proxy) -> Scored:
        return score(by, *(found[f"{name}_{part}"][rows] for part in ("hidden", "parity", "answers")))

    every, judged = found["every_lengths"], found["evaluation"]
    short = every[judged] <= top
    # There are only two alternating strings of a length, so the random sets share theirs. Here the table is learned on
    # those that begin with 0 and judged by those that begin with 1.
    learn = (found["every_first"] == 0) & (every <= config.test_length)
    half = ProxyCircuit.fit(
        found["probe_hidden"][0], found["every_hidden"][learn], found["every_parity"][learn],
        states=config.states, quantile=config.quantile, seed=seed,
    )  # fmt: skip
    return {
        "alternating": on("every", judged),
        "in_distribution": on("every", judged[short]),
        "out_of_distribution": on("every", judged[~short]),
        "other_phase": on("every", (found["every_first"] == 1) & (every <= config.test_length), half),
        "longer": on("every", every > config.test_length),
        "test": on("test", np.arange(len(found["test_parity"]))),
    }
