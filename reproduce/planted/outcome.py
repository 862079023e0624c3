"""The report: tables, and our numbers beside the summary's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reproduce.base import Comparison, Outcome
from reproduce.planted import measure
from reproduce.planted.analyse import DETECTORS, pooled
from reproduce.planted.config import Config, make_task
from reproduce.planted.figures import REGIMES
from reproduce.planted.planting import KINDS
from reproduce.planted.statistics import balanced_spearman_ceiling
from reproduce.template import fill

Numbers = Mapping[str, Any]
SUMMARY = "summary"
CLAIMS = {"sketched": 0.87, "exact": 0.89, "classic": 0.62}


def make_outcome(numbers: Numbers, config: Config) -> Outcome:
    """The outcome of a run.

    Args:
        numbers: findings by task.
        config: of the run.
    """
    definitions = list(next(iter(numbers.values()))["critical"])
    largest = measure.sketched(config.sketch_sizes[-1])
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
            "definitions": {name: measure.DEFINITIONS.get(name) for name in definitions},
            "largest": largest,
            "exact": measure.EXACT,
            "classic": measure.CLASSIC,
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
            "definitions": measure.DEFINITIONS,
        },
    )


def _comparisons(numbers: Numbers, measures: Numbers, config: Config) -> Iterable[Comparison]:
    copies = balanced_spearman_ceiling(config.copies, equal=True)
    rule = balanced_spearman_ceiling(config.rule_examples, equal=False)
    ceiling = f"a perfect ranking gives {copies:.2f} for copies, {rule:.2f} for a rule: half of the truth is tied"
    largest = measure.sketched(config.sketch_sizes[-1])
    for name, key in ((largest, "sketched"), (measure.EXACT, "exact"), (measure.CLASSIC, "classic")):
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
    for name in (measure.LAST_CHECKPOINT, measure.LAST_STEP, measure.READ_OUT):
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
