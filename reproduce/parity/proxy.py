"""The proxy circuit (paper D.2): nearest of k centroids at the read-out step, then a table from state to parity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from reproduce.arrays import Array, Integers

UNSEEN = -1
"""Answer of a state that no calibration example ended in; never right."""


@dataclass(frozen=True)
class ProxyCircuit:
    """A finite automaton read off a trajectory of hidden states.

    Attributes:
        centroids: ``(k, width)``, in the order in which the trajectory first visits them.
        lookup: ``(k,)``, parity by state, 0 or 1, or :data:`UNSEEN`.
        counts: ``(k, 2)``, calibration examples by state and parity.
        threshold: distance to the nearest centroid up to which a state counts as on the manifold.
    """

    centroids: Array
    lookup: Integers
    counts: Integers
    threshold: float

    @classmethod
    def fit(
        cls,
        trajectory: Array,
        hidden: Array,
        parity: Integers,
        *,
        states: int = 4,
        quantile: float = 0.95,
        seed: int = 0,
    ) -> ProxyCircuit:
        """Discretise one trajectory and learn the table from a calibration set.

        Args:
            trajectory: answer-position states of one probe after each loop step, ``(steps, width)``.
            hidden: read-out states of the calibration set, ``(n, width)``.
            parity: its true parities, 0 or 1, ``(n,)``.
            states: k of k-means.
            quantile: of the calibration set's distances, for the threshold.
            seed: of k-means.

        Raises:
            ValueError: shapes do not fit, or there are fewer steps than states.
        """
        if len(trajectory) < states:
            raise ValueError(f"states: got {states} for a trajectory of {len(trajectory)} steps; pass fewer")
        if hidden.ndim != 2 or parity.shape != hidden.shape[:1] or trajectory.shape[1:] != hidden.shape[1:]:
            raise ValueError(
                f"hidden, parity: got shapes {hidden.shape} and {parity.shape} for a trajectory of shape "
                f"{trajectory.shape}; pass (n, width) and (n,) of the same width"
            )
        means = KMeans(states, n_init=20, random_state=seed).fit(trajectory)
        order = list(dict.fromkeys(means.labels_.tolist()))
        circuit = cls(means.cluster_centers_[order], np.full(states, UNSEEN), np.zeros((states, 2), int), 0.0)
        reached, distance = circuit.assign(hidden)
        counts = np.zeros((states, 2), dtype=np.int64)
        np.add.at(counts, (reached, parity), 1)
        lookup = np.where(counts.sum(1) > 0, counts.argmax(1), UNSEEN)
        return cls(circuit.centroids, lookup, counts, float(np.quantile(distance, quantile)))

    def assign(self, hidden: Array) -> tuple[Integers, Array]:
        """Nearest centroid of each of ``(n, width)`` hidden states, and the Euclidean distance to it."""
        away = np.linalg.norm(np.asarray(hidden)[:, None] - self.centroids, axis=2)
        return np.asarray(away.argmin(1)), np.asarray(away.min(1))

    def predict(self, hidden: Array) -> Integers:
        """Parity of each of ``(n, width)`` read-out states, or :data:`UNSEEN`."""
        return np.asarray(self.lookup[self.assign(hidden)[0]])


@dataclass(frozen=True)
class Scored:
    """How well a proxy does on one set.

    Attributes:
        n: examples.
        accuracy: share whose parity it gets right; NaN for an empty set.
        agreement: share on which it says what the model says.
        coverage: share within the distance threshold.
        selective: accuracy on those alone; NaN if there are none.
    """

    n: int
    accuracy: float
    agreement: float
    coverage: float
    selective: float


def score(proxy: ProxyCircuit, hidden: Array, parity: Integers, answers: Integers) -> Scored:
    """Accuracy of a proxy, on all examples and on those near a centroid.

    Args:
        proxy: the circuit.
        hidden: read-out states, ``(n, width)``.
        parity: true parities, ``(n,)``.
        answers: the model's own, ``(n,)``.
    """
    if not len(hidden):
        return Scored(0, *[float("nan")] * 4)
    near = proxy.assign(hidden)[1] <= proxy.threshold
    said = proxy.predict(hidden)
    right = said == parity
    selective = float(right[near].mean()) if near.any() else float("nan")
    return Scored(len(hidden), float(right.mean()), float((said == answers).mean()), float(near.mean()), selective)
