"""From the stages' arrays to the numbers of the report, and our numbers beside the summary's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reproduce.base import Comparison, Outcome
from reproduce.planted import statistics
from reproduce.planted.config import Config, make_task
from reproduce.planted.measure import (
    CLASSIC,
    DEFINITIONS,
    EXACT,
    LAST_CHECKPOINT,
    LAST_STEP,
    READ_OUT,
    by_name,
    sketched,
)
from reproduce.planted.planting import KINDS, Planted
from reproduce.planted.statistics import balanced_spearman_ceiling
from reproduce.template import fill

Stage = Mapping[str, Any]
REGIMES = {"answer": "trained on the answer only", "taught": "taught every step"}
DETECTORS = {
    "self_exact": "self-influence, SDI exact, summed",
    "self_sketched": "self-influence, SDI sketched, summed",
    "self_last": "self-influence, last checkpoint only",
    "loss_last": "loss at the last checkpoint",
    "loss_mean": "loss, mean over checkpoints",
    "harm": "minus the mean influence on plain queries",
}

Numbers = Mapping[str, Any]
SUMMARY = "summary"
CLAIMS = {"sketched": 0.87, "exact": 0.89, "classic": 0.62}


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


def make_outcome(numbers: Numbers, config: Config) -> Outcome:
    """The outcome of a run.

    Args:
        numbers: findings by task.
        config: of the run.
    """
    definitions = list(next(iter(numbers.values()))["critical"])
    largest = sketched(config.sketch_sizes[-1])
    measures = {
        name: {m: pooled(numbers, name, m, config) for m in ("rank_biserial", "spearman")} for name in definitions
    }
    best = max(definitions, key=lambda name: measures[name]["rank_biserial"][0])
    text = fill(
        "planted",
        {
            "config": config,
            "numbers": numbers,
            "measures": measures,
            "tasks": {name: make_task(name, large=config.large) for name in numbers},
            "claims": CLAIMS,
            "definitions": {name: DEFINITIONS.get(name) for name in definitions},
            "largest": largest,
            "exact": EXACT,
            "classic": CLASSIC,
            "best": best,
            "worst": max(found["conservation"] for found in numbers.values()),
            "copies": balanced_spearman_ceiling(config.copies, equal=True),
            "rule": balanced_spearman_ceiling(config.rule_examples, equal=False),
            "total": config.examples + config.mislabelled + 2 * config.families * config.copies + config.rule_examples,
            "feature_share": next(iter(numbers.values()))["feature_share"],
            "kinds": KINDS,
            "detectors": DETECTORS,
        },
        {"interval": interval_text, "change": change_text, "tested": _tested, "each": _each, "mean": mean_of},
    )
    return Outcome(
        title="Algorithmic tasks: does influence meet known steps and planted examples?",
        summary=text.summary,
        body=text.body,
        comparisons=tuple(_comparisons(numbers, measures, config)),
        numbers={
            "tasks": {task: {**found, "critical": _means(found["critical"])} for task, found in numbers.items()},
            "pooled": measures,
            "definitions": DEFINITIONS,
        },
    )


def _comparisons(numbers: Numbers, measures: Numbers, config: Config) -> Iterable[Comparison]:
    copies = balanced_spearman_ceiling(config.copies, equal=True)
    rule = balanced_spearman_ceiling(config.rule_examples, equal=False)
    ceiling = f"a perfect ranking gives {copies:.2f} for copies, {rule:.2f} for a rule: half of the truth is tied"
    largest = sketched(config.sketch_sizes[-1])
    for name, key in ((largest, "sketched"), (EXACT, "exact"), (CLASSIC, "classic")):
        note = "equals exact SDI, by conservation" if key == "classic" else ""
        found = measures[name]
        yield Comparison(
            f"rank-biserial correlation with planted examples: {name}",
            interval_text(found["rank_biserial"]),
            CLAIMS[key],
            SUMMARY,
            note,
        )
        yield Comparison(
            f"Spearman correlation, balanced pool: {name}",
            interval_text(found["spearman"]),
            CLAIMS[key],
            SUMMARY,
            ceiling,
        )
    for name in (LAST_CHECKPOINT, LAST_STEP, READ_OUT):
        yield Comparison(
            f"rank-biserial correlation: {name}",
            interval_text(measures[name]["rank_biserial"]),
            CLAIMS["classic"],
            SUMMARY,
            "another reading of “classic TracIn”",
        )
    for task, found in numbers.items():
        for regime, meaning in REGIMES.items():
            one = found["timing"][regime]
            truth = "known" if regime == "taught" else "decoded"
            peak = one[f"{truth}_peak"]
            other = one[f"{truth}_specific"]
            note = (
                "" if other is None else f"Spearman {other['value']:.2f}, other queries' changes: {other['null']:.2f}"
            )
            note += "" if other is None else f" (p = {other['p']:.2g})"
            claimed = "exactly at the step" if task == "sorting" else None
            yield Comparison(
                f"{task}, {meaning}: queries whose energy peaks at a step with the most {truth} changes",
                "–"
                if peak is None
                else f"{peak['value']:.0%} (shuffled steps: {peak['null']:.0%}, p = {peak['p']:.2g})",
                claimed,
                SUMMARY if claimed else "",
                note,
            )


def _means(critical: Numbers) -> dict[str, Any]:
    return {
        name: {m: {kind: mean_of(values) for kind, values in kinds.items()} for m, kinds in measures.items()}
        for name, measures in critical.items()
    }


def mean_of(values: Sequence[float]) -> float:
    """Mean of a list."""
    return sum(values) / len(values)


def interval_text(found: Sequence[float]) -> str:
    """``"0.50 [0.40, 0.60]"`` from (mean, low, high)."""
    value, low, high = found
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def change_text(found: Sequence[float]) -> str:
    """The same of a difference, with signs."""
    value, low, high = found
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _tested(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} / {found['null']:.2f} (p {found['p']:.2g})"


def _each(values: Sequence[float], spec: str) -> str:
    return " ".join(format(v, spec) for v in values)
