"""Probes at the step where influence peaks, against probes at other steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from reproduce.planted.config import make_task
from reproduce.planted.timing import profiles
from reproduce.uses.config import Config

REGIMES = {"trained on the answer only": False, "taught every step": True}
TARGETS = ("answer", "state")


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Accuracy of linear probes by step, and where influence peaks, for one seed.

    Returns:
        For each regime ``energy`` (mean share of a query's SDI energy, by step), ``peak`` (1-based), and for probes of
        the ``answer`` and of the ``state`` of the step: ``accuracy`` by step.
    """
    task = make_task(config.task, large=config.planted.large)
    found = {}
    for regime, taught in REGIMES.items():
        one = profiles(task, config.of_seed(seed), taught=taught)
        energy = np.asarray(one["energy"])
        share = (energy / energy.sum(1, keepdims=True)).mean(0)
        found[regime] = {
            "energy": share.tolist(),
            "peak": int(share.argmax()) + 1,
            # The first is read from the input, before any step.
            **{target: np.asarray(one[f"probe_{target}"])[1:].tolist() for target in TARGETS},
        }
    return found
