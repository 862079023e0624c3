"""What the experiment ``error`` found: tables, rows beside the paper, verdicts, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from stepinfluence.evaluation import Estimate

from reproduce.base import Comparison, Outcome, Result, Run
from reproduce.error import figures
from reproduce.error.config import FAMILIES, Config
from reproduce.error.readings import (
    bin_errors,
    by_structure,
    lemma_numbers,
    level_slope,
    of_models,
    recall_table,
    same_recall,
    series,
    size_slope,
)
from reproduce.error.verdicts import (
    DEEP,
    Verdict,
    bias_text,
    depth_bias,
    depth_verdicts,
    interval,
    lemma_verdicts,
    sparse_bias,
    sparsity_verdicts,
)
from reproduce.fidelity.statistics import loglog_slope
from reproduce.template import fill

ORTHOGONAL_BELOW = 0.1
"""Pairs of a smaller cosine are called nearly orthogonal."""


def outcome(
    run: Run[Config], depth: Mapping[str, list[Result]], by_seed: Mapping[str, list[Result]], tight: Result
) -> Outcome:
    """Everything the report shows; arguments are the stages' results, a list over models each."""
    config = run.config
    structures = by_structure(by_seed["masked"], by_seed["active"])
    found = search_numbers(by_seed["trained"], by_seed["untrained"], config)
    verdicts = [
        *depth_verdicts(depth, config),
        *sparsity_verdicts(structures),
        *lemma_verdicts(by_seed["lemma"], tight, config),
        *search_verdicts(found, config),
    ]
    lemma = lemma_numbers(by_seed["lemma"], config)
    run.figure("depth", figures.depth(depth, config))
    run.figure("sparsity", figures.sparsity(structures))
    run.figure("lemma", figures.lemma(by_seed["lemma"], config))
    run.figure("search", figures.search(by_seed["trained"], by_seed["untrained"], config))
    values = {
        "config": config,
        "families": FAMILIES,
        "deep": DEEP,
        "verdicts": verdicts,
        "depth": {name: depth_rows(stages, config) for name, stages in depth.items()},
        "rounding": max(lv["rounding"] for s in depth.values() for one in s for lv in one["levels"] if lv["rounding"]),
        "structures": {name: sparsity_rows(stages) for name, stages in structures.items()},
        "lemma": lemma,
        "tight": tight,
        "search": found,
        "below": ORTHOGONAL_BELOW,
    }
    text = fill("error", values, {"interval": interval, "percent": percent})
    return Outcome(
        title="Error of sketched influence: depth, sparsity, shared hashes, orthogonal pairs",
        summary=text.summary,
        comparisons=comparisons(depth, structures, lemma, tight, found, config),
        body=text.body,
        numbers={
            "verdicts": [asdict(v) for v in verdicts],
            "depth": plain(values["depth"]),
            "sparsity": plain(values["structures"]),
            "lemma": plain(lemma),
            "tight": dict(tight),
            "search": plain(found),
        },
    )


def depth_rows(stages: Sequence[Result], config: Config) -> list[dict[str, Any]]:
    """Rows of the table: one for each number of steps."""
    rows: list[dict[str, Any]] = []
    for k, loops in enumerate(config.depth.loops):
        accuracies = [s["levels"][k]["accuracy"] for s in stages]
        rows.append(
            {
                "loops": loops,
                "accuracy": None if accuracies[0] is None else float(np.mean(accuracies)),
                "effective": float(np.mean([s["levels"][k]["effective"] for s in stages])),
                "cosine": float(np.mean([s["levels"][k]["cosine"] for s in stages])),
                "relative": {h: series(stages, h, "relative")[k] for h in FAMILIES},
                "cross": series(stages, "balanced", "relative_cross")[k],
                "normalised": {h: series(stages, h, "normalised")[k].value for h in FAMILIES},
                "bound": {h: series(stages, h, "bound_normalised")[k].value for h in FAMILIES},
            }
        )
    return rows


def sparsity_rows(stages: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of the table: one for each share."""
    rows = []
    for k, level in enumerate(stages[0]["levels"]):
        rows.append(
            {
                "kept": float(np.mean([s["levels"][k]["kept"] for s in stages])),
                "accuracy": float(np.mean([s["levels"][k]["accuracy"] for s in stages])) if "active" in level else None,
                "active": level.get("active"),
                "cosine": float(np.mean([s["levels"][k]["cosine"] for s in stages])),
                "relative": {h: series(stages, h, "relative")[k] for h in FAMILIES},
                "normalised": {h: series(stages, h, "normalised")[k].value for h in FAMILIES},
                "bound": {h: series(stages, h, "bound_normalised")[k].value for h in FAMILIES},
                "kurtosis": series(stages, "iid", "kurtosis")[k].value,
                "zeros": series(stages, "iid", "zeros")[k].value,
            }
        )
    return rows


def search_numbers(trained: Sequence[Result], untrained: Sequence[Result], config: Config) -> dict[str, Any]:
    """Recall and errors of both kinds of models."""
    part = config.search
    near = [b for b in range(len(part.cosines)) if part.cosines[b] <= ORTHOGONAL_BELOW]
    found: dict[str, Any] = {"models": {}}
    for name, stages in (("trained", trained), ("untrained", untrained)):
        pairs = np.mean([s["pairs"] for s in stages], axis=0)
        errors = {h: bin_errors(stages, f"error_{h}") for h in FAMILIES}
        table = recall_table(stages, "recall_balanced")
        found["models"][name] = {
            "pairs": pairs.tolist(),
            "near": float(pairs[near].sum()),
            "errors": {h: e.tolist() for h, e in errors.items()},
            "slopes": {h: size_slope(stages, h, part.sizes, near) for h in FAMILIES},
            "recall": {h: recall_table(stages, f"recall_{h}") for h in FAMILIES},
            "recall_steps": {h: recall_table(stages, f"recall_steps_{h}") for h in FAMILIES},
            "union": np.mean([s["union_balanced"] for s in stages], axis=0).tolist(),
            "equals": [same_recall(table, part.sizes, config.sketch_size, j) for j in range(1, len(part.candidates))],
            "gains": [
                of_models(stages, lambda s, j=j: _gain(s, part.sizes.index(config.sketch_size), j))  # type: ignore[misc]  # j
                for j in range(len(part.candidates))
            ],
        }
    return found


def _gain(stage: Result, size: int, j: int) -> float:
    table = np.asarray(stage["recall_balanced"], dtype=np.float64).mean(1)
    return float(table[size, j] - table[size, 0])


def search_verdicts(found: Mapping[str, Any], config: Config) -> list[Verdict]:
    """On nearly orthogonal pairs."""
    part, models = config.search, found["models"]
    slopes = {name: one["slopes"]["balanced"] for name, one in models.items()}
    missing = [name for name, slope in slopes.items() if not slope.low <= -0.5 <= slope.high]
    at = part.sizes.index(config.sketch_size)
    steep = {name: _angle_slope(one["errors"]["balanced"][at], part.cosines) for name, one in models.items()}
    gains = {name: one["gains"][-1] for name, one in models.items()}
    complete = [name for name, one in models.items() if one["recall"]["balanced"][at][-1].value >= 0.99]
    return [
        Verdict(f"for pairs of a cosine below {ORTHOGONAL_BELOW} the error falls as one over the root of m", "theory",
                "; ".join(f"{name} {interval(slope)}" for name, slope in slopes.items()),
                "not for " + ", ".join(missing) if missing else "yes"),
        Verdict("beside the score it grows as one over the cosine", "theory",
                "; ".join(f"{name}: log-log slope {slope:.2f}" for name, slope in steep.items()),
                "yes" if all(abs(slope + 1) < 0.2 for slope in steep.values()) else "no"),
        Verdict(f"re-ranking {part.candidates[-1]} candidates exactly finds more of the top {part.top} "
                f"(m = {config.sketch_size})", "ours", "; ".join(f"{n} + {interval(g)}" for n, g in gains.items()),
                "yes" if all(g.low > 0 for g in gains.values()) else "no"),
        Verdict(f"it finds all of them (99 %, m = {config.sketch_size})", "ours",
                "; ".join(f"{n} {interval(one['recall']['balanced'][at][-1])}" for n, one in models.items()),
                "for " + ", ".join(complete) if complete else "no"),
    ]  # fmt: skip


def _angle_slope(errors: Sequence[float], cosines: Sequence[float]) -> float:
    """Log-log slope of error over score on the cosine, by the middles of the bins that hold pairs."""
    middles = [(low * high) ** 0.5 for low, high in pairwise(cosines)]
    kept = [(m, e) for m, e in zip(middles, errors[1:], strict=False) if np.isfinite(e) and e > 0]
    return loglog_slope([m for m, _ in kept], [e for _, e in kept])[0] if len(kept) > 1 else float("nan")


def comparisons(
    depth: Mapping[str, list[Result]],
    structures: Mapping[str, list[Result]],
    lemma: Mapping[str, list[dict[str, Any]]],
    tight: Result,
    found: Mapping[str, Any],
    config: Config,
) -> tuple[Comparison, ...]:
    """Rows beside the paper and its summary."""
    loops, last, part = config.depth.loops, config.lemma.checkpoints[-1], config.search
    at = part.sizes.index(config.sketch_size)
    rows = [Comparison(f"bias of SDI at τ above {DEEP}", bias_text(depth_bias(depth, config)), "could be significant",
                       "summary", "all families, five kinds of loops; 5 % for all tests together")]  # fmt: skip
    for name, stages in depth.items():
        ends = [series(stages, "balanced", "relative")[k] for k in (0, -1)]
        rows.append(
            Comparison(
                f"relative error of SDI, τ = {loops[0]} → {loops[-1]}, {name}",
                f"{interval(ends[0])} → {interval(ends[1])}",
                "grows for τ ≫ 20",
                "summary",
                f"log-log slope {interval(level_slope(stages, 'balanced', 'relative', 'loops'))}; at most 0.5 by "
                "theory",
            )
        )
    rows.append(Comparison("bias of SDI with sparse gradients", bias_text(sparse_bias(structures)),
                           "could be significant", "summary", "all families, four kinds of sparsity"))  # fmt: skip
    for name, stages in structures.items():
        parts = [
            f"{h} {series(stages, h, 'normalised')[0].value:.3f} → {series(stages, h, 'normalised')[-1].value:.3f}"
            for h in FAMILIES
        ]
        kept = [sparsity_rows(stages)[k]["kept"] for k in (0, -1)]
        tails = [series(stages, "iid", "kurtosis")[k].value for k in (0, -1)]
        rows.append(
            Comparison(
                f"error over the gradients' norms, {name}: {percent(kept[0])} → {percent(kept[1])} not zero",
                "; ".join(parts),
                None,
                "",
                f"kurtosis {tails[0]:.1f} → {tails[1]:.1f} (iid)",
            )
        )
    rows += [
        Comparison(f"mean squared error over eq. 12, K = {last}, shared hashes, iid: largest of all pairs and steps",
                   lemma["iid"][-1]["largest"], "at most 1", "Lemma 1", f"median {lemma['iid'][-1]['median']:.2f}"),
        Comparison("the same, matrices of ones", f"{tight['iid']['ratio']:.2f} ± {2 * tight['iid']['se']:.2f}",
                   "1 in the limit", "Lemma 4", f"{config.lemma.tight_size} by {config.lemma.tight_size}"),
        Comparison(f"mean squared error, hashes shared by K = {last} checkpoints over hashes of their own",
                   interval(lemma["iid"][-1]["shared"]), f"correlated, at most {last}", "App. C", "iid"),
    ]  # fmt: skip
    for name, one in found["models"].items():
        table = one["recall"]["balanced"][at]
        rows.append(
            Comparison(
                f"recall of the top {part.top} by sketches, m = {config.sketch_size}, {name}",
                interval(table[0]),
                None,
                "",
                "re-ranked exactly: "
                + ", ".join(f"{table[j].value:.2f} with {c} candidates" for j, c in enumerate(part.candidates) if j),
            )
        )
    return tuple(rows)


def percent(value: float) -> str:
    """A share in per cent, two digits."""
    return f"{100 * value:.2g} %"


def plain(value: Any) -> Any:
    """Estimates as dicts, for ``results.json``."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
