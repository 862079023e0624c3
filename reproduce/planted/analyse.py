"""From the stages' arrays to the numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reproduce.planted import statistics
from reproduce.planted.config import Config
from reproduce.planted.measure import CLASSIC, EXACT, by_name, sketched
from reproduce.planted.planting import KINDS, Planted

Stage = Mapping[str, Any]
Array = npt.NDArray[np.float64]
DETECTORS = {
    "self_exact": "self-influence, SDI exact, summed",
    "self_sketched": "self-influence, SDI sketched, summed",
    "self_last": "self-influence, last checkpoint only",
    "loss_last": "loss at the last checkpoint",
    "loss_mean": "loss, mean over checkpoints",
    "harm": "minus the mean influence on plain queries",
}


def timing(stage: Stage, config: Config) -> dict[str, Any]:
    """How influence energy aligns with changes of the state: a statistic, its null and p-value for each measure."""
    energy = np.asarray(stage["energy"], dtype=np.float64)
    rng = np.random.default_rng((config.seed, 1))
    found: dict[str, Any] = {}
    for truth in ("decoded", "known"):
        changes = np.asarray(stage[truth], dtype=np.float64)
        for name, statistic, over in (
            ("correlation", statistics.profile_correlation, "steps"),
            ("specific", statistics.profile_correlation, "queries"),
            ("peak", statistics.peak_alignment, "steps"),
            ("residual", statistics.residual_correlation, "queries"),
        ):
            tested = statistics.permutation_test(
                statistic, energy, changes, over=over, resamples=config.resamples, rng=rng
            )
            # Where nothing varies there is nothing to test: NaN, which JSON does not have.
            found[f"{truth}_{name}"] = vars(tested) if np.isfinite(tested.value) else None
        found[f"{truth}_mean"] = changes.mean(0).tolist()
    found["energy_share"] = (energy / energy.sum(1, keepdims=True)).mean(0).tolist()
    for name in ("probe_answer", "probe_state"):
        found[name] = np.asarray(stage[name]).tolist()
    return {**found, "position_accuracy": stage["position_accuracy"], "answer_accuracy": stage["answer_accuracy"]}


def critical(stage: Stage, planted: Planted, config: Config) -> dict[str, Any]:
    """Per definition and kind of planting: rank-biserial and balanced Spearman correlation of every query."""
    found: dict[str, Any] = {}
    for name, scores in by_name(stage).items():
        rng = np.random.default_rng((config.seed, 2))  # the same pools for every definition
        found[name] = {"rank_biserial": {}, "spearman": {}}
        for kind in KINDS:
            # Copies with a wrong answer are to be found at the harmful end.
            sign = -1.0 if kind == "poisoned" else 1.0
            pairs = [(sign * scores[:, q].astype(np.float64), planted.critical[:, q]) for q in planted.of_kind(kind)]
            found[name]["rank_biserial"][kind] = [statistics.rank_biserial(s, c) for s, c in pairs]
            found[name]["spearman"][kind] = [statistics.balanced_spearman(s, c, rng) for s, c in pairs]
    return found


def conservation(stage: Stage) -> float:
    """Largest difference of the steps' sum from TracIn computed without steps, in units of the largest TracIn."""
    scores = by_name(stage)
    return float(np.abs(scores[EXACT] - scores[CLASSIC]).max() / np.abs(scores[CLASSIC]).max())


def mislabelled(stage: Stage, planted: Planted, config: Config) -> dict[str, Any]:
    """How well single examples with a wrong answer are told from examples with a right one: AUC with interval."""
    judged = planted.mislabelled | ~planted.wrong
    positive = planted.mislabelled[judged]
    self_exact, losses = np.asarray(stage["self_exact"]), np.asarray(stage["train_losses"])
    largest = by_name(stage)[sketched(config.sketch_sizes[-1])]
    values = {
        "self_exact": self_exact.sum(1),
        "self_sketched": np.asarray(stage["self_sketched"]).sum(1),
        "self_last": np.asarray(stage["self_last"]),
        "loss_last": losses[-1],
        "loss_mean": losses.mean(0),
        "harm": -largest[:, planted.of_kind("plain")].mean(1),
    }
    rng = np.random.default_rng((config.seed, 4))

    def area(scores: npt.NDArray[Any]) -> tuple[float, float, float]:
        return statistics.auc_interval(
            scores[judged].astype(np.float64), positive, resamples=min(config.resamples, 1000), rng=rng
        )

    return {
        **{name: area(scores) for name, scores in values.items()},
        "by_step": [area(self_exact[:, step]) for step in range(self_exact.shape[1])],
    }


def retraining(stage: Stage, planted: Planted, config: Config) -> dict[str, Any]:
    """Loss of the queries without the chosen examples minus without random ones, in nats: mean with interval."""
    rng = np.random.default_rng((config.seed, 5))
    random = np.asarray(stage["random"], dtype=np.float64)
    found: dict[str, Any] = {"found": dict(stage["found"])}
    for kind in ("rule", "poisoned", "plain"):
        columns = planted.of_kind(kind)
        difference = np.asarray(stage[kind], dtype=np.float64)[:, columns] - random[:, columns]
        found[kind] = statistics.two_way_interval(difference, resamples=config.resamples, rng=rng)
        found[f"{kind}_random_loss"] = float(random[:, columns].mean())
    return found


def pooled(per_task: Mapping[str, Any], name: str, measure: str, config: Config) -> tuple[float, float, float]:
    """Mean over every planted query of every task, with a 95 % interval over queries."""
    values = [v for task in per_task.values() for kind in KINDS for v in task["critical"][name][measure][kind]]
    return statistics.interval(
        np.array(values), resamples=config.resamples, rng=np.random.default_rng((config.seed, 6))
    )
