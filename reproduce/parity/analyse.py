"""What the parity experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from stepinfluence.attribution.periods import Period
from stepinfluence.models.parity_task import ParityExample

from reproduce.base import Comparison, Outcome, Result, Run
from reproduce.parity import figures
from reproduce.parity.clock import Clock, clock
from reproduce.parity.config import CONFIGS, Config
from reproduce.parity.profiles import Profiles, summarise
from reproduce.parity.proxy import UNSEEN
from reproduce.parity.readings import Readings, read
from reproduce.template import fill

PAPER_MATRIX = ((0, 0, 1, 0), (0, 0.09, 0, 0.91), (0, 1, 0, 0), (1, 0, 0, 0))
"""The paper's transition matrix (section 4); the numbering of states is arbitrary."""


def lag_text(lag: int) -> str:
    """A period for people."""
    return str(lag) if lag else "none"


def percent(share: float) -> str:
    """A share for people."""
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def outcome(
    run: Run[Config],
    trained: Result,
    found: Result,
    scores: Sequence[Result],
    subset: Sequence[ParityExample],
    test: Sequence[ParityExample],
    others: Mapping[int, Result],
) -> Outcome:
    """Everything the report shows; arguments are the stages' results and the strings that were scored."""
    config = run.config
    n = config.test_length
    readings = {config.seed: read(found, config, config.seed)}
    readings |= {seed: read(one, config, seed) for seed, one in others.items()}
    clocks = {config.seed: _clock(found, n)} | {seed: _clock(one, n) for seed, one in others.items()}
    ours, turning = readings[config.seed], clocks[config.seed]
    profiles = summarise(config, scores, trained["digits"], ours.margin, subset, test)
    accuracies = {config.seed: found["accuracy"]} | {seed: one["accuracy"] for seed, one in others.items()}
    draw(run, found, ours, turning, profiles, accuracies)
    text = fill(
        "parity",
        {
            **_values(config, trained, found, ours, turning, profiles),
            "runs": [
                {
                    "seed": seed,
                    "readings": one,
                    "cosine": one.cosine.get(config.lag, float("nan")),
                    "clock": clocks[seed],
                }
                for seed, one in readings.items()
            ],
        },
        {"percent": percent, "lag": lag_text},
    )
    return Outcome(
        title="Parity: from a period in the influence to a mechanism",
        summary=text.summary,
        body=text.body,
        comparisons=_comparisons(config, ours, profiles, turning, readings, trained["digits"]),
        numbers={
            "training": {k: v for k, v in trained.items() if not isinstance(v, np.ndarray)},
            "accuracy_by_length": {
                seed: dict(zip(found["accuracy_lengths"].tolist(), values.tolist(), strict=True))
                for seed, values in accuracies.items()
            },
            "sdi_profile": profiles.all.values.tolist(),
            "sdi_profile_trained": profiles.trained.values.tolist(),
            "period_by_checkpoint": list(profiles.period_by_checkpoint),
            "share_by_checkpoint": list(profiles.share_by_checkpoint),
            "own_spearman": profiles.own_spearman,
            "margin": ours.margin.tolist(),
            "states": ours.states.tolist(),
            "seeds": {seed: _numbers(readings[seed], clocks[seed]) for seed in readings},
            "running_parity": {k: found[k].tolist() for k in ("running_start", "running_end")},
        },
    )


def draw(
    run: Run[Config],
    found: Result,
    ours: Readings,
    turning: Clock,
    profiles: Profiles,
    accuracies: Mapping[int, Any],
) -> None:
    """Save the figures that the report shows."""
    n, late = run.config.test_length, profiles.trained
    run.figure("accuracy", figures.lengths(accuracies, found["accuracy_lengths"], run.config.training.max_digits))
    run.figure("profile", figures.profile(profiles.all.values, late.values, ours.margin, late.peaks, n))
    run.figure("recurrence", figures.recurrence(late.values[:n], ours, ours.cosine))
    run.figure("self-influence", figures.own_influence(profiles.own))
    run.figure("portrait", figures.portrait(ours))
    run.figure("clock", figures.clocks(turning, profiles.test_clock))


def _values(
    config: Config, trained: Result, found: Result, ours: Readings, turning: Clock, profiles: Profiles
) -> dict[str, Any]:
    """What the report speaks of, of the run's own seed."""
    n = config.test_length
    ones, right = found["count_ones"], found["count_right"]
    away = np.abs(turning.found_outside - turning.expected_outside)
    start, end = (float(found[f"running_{side}"][: n - 1].mean()) for side in ("start", "end"))
    return {
        "config": config,
        "trained": trained,
        "ours": ours,
        "clock": turning,
        "profiles": profiles,
        "late": profiles.trained,
        "gaps": np.diff(profiles.trained.peaks).tolist(),
        "cosine": ours.cosine.get(config.lag, float("nan")),
        "cycle": [k + 1 for k in ours.cycle],
        "paper_matrix": PAPER_MATRIX,
        "best_k": max(ours.silhouette, key=lambda k: ours.silhouette[k]),
        "lookup": list(zip(ours.proxy.counts.tolist(), ours.proxy.lookup.tolist(), strict=True)),
        "unseen": UNSEEN,
        "n_unseen": int((ours.proxy.lookup == UNSEEN).sum()),
        "running_start": start,
        "running_end": end,
        "order_cosine": found["count_cosine"].mean(),
        "away": float(away.mean()) if len(away) else None,
        "wrong": _ranges([int(k) for k in np.unique(ones) if right[ones == k].mean() < 0.5]),
    }


def _ranges(numbers: list[int]) -> str:
    """``0, 2, 28-33``."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def _clock(found: Result, n: int) -> Clock:
    return clock(found["count_difference"][:, :n], found["count_ones"], n)


def _numbers(one: Readings, turning: Clock) -> dict[str, Any]:
    return {
        "accuracy": one.accuracy,
        "margin_period": vars(one.margin_period),
        "cosine": dict(one.cosine),
        "silhouette": dict(one.silhouette),
        "matrix": one.matrix.tolist(),
        "determinism": one.determinism,
        "cycle": list(one.cycle),
        "explained": one.explained,
        "lookup": one.proxy.lookup.tolist(),
        "calibration_counts": one.proxy.counts.tolist(),
        "threshold": one.proxy.threshold,
        "proxy": {name: vars(s) for name, s in one.scores.items()},
        "clock": {k: getattr(turning, k) for k in ("slope", "intercept", "correlation", "error")},
    }


def _comparisons(
    config: Config,
    ours: Readings,
    profiles: Profiles,
    turning: Clock,
    readings: Mapping[int, Readings],
    digits: Sequence[int],
) -> tuple[Comparison, ...]:
    n, lag, s = config.test_length, config.lag, ours.scores
    every, late = profiles.all, profiles.trained
    small = "" if config.training.model == CONFIGS["paper"].training.model else "a smaller model, trained for less time"
    spread = f"{small}; " * bool(small) + "over seeds: " + ", ".join(percent(r.accuracy) for r in readings.values())
    return (
        Comparison(f"accuracy at {n} bits", percent(ours.accuracy), "100 %", "§4", spread),
        Comparison("period of the summed SDI profile, all checkpoints, loop steps", lag_text(every.period.lag), 4,
                   "Fig. 1A", f"{_period(every.period)}; {percent(max(profiles.share_by_checkpoint))} of it is one "
                   "checkpoint, at "
                   f"{digits[int(np.argmax(profiles.share_by_checkpoint))]} bits of the curriculum"),
        Comparison("period of the summed SDI profile, from the end of the curriculum", lag_text(late.period.lag), 4,
                   "Fig. 1A", f"{_period(late.period)}; {profiles.n_trained} checkpoint(s)"),
        Comparison("period of the logit margin, loop steps", lag_text(ours.margin_period.lag), 4, "Fig. 1A",
                   _period(ours.margin_period)),
        Comparison("last SDI peak at step", str(int(late.peaks[-1])) if len(late.peaks) else "none", str(n),
                   "Fig. 1A", f"{percent(late.last_share)} of the absolute profile is at step {n}"),
        Comparison("largest SDI after the read-out", profiles.after, 0, "§4, D.2", "exactly zero by construction"),
        Comparison("margin increases follow SDI by, loop steps", str(late.delay), 1, "§4",
                   f"best of 0 to 3; correlation {late.delay_correlation:.2f}"),
        Comparison(f"mean cosine of states {lag} steps apart", ours.cosine.get(lag, float("nan")), "about 0.95", "§4"),
        Comparison("transitions that are their state's likeliest", percent(ours.determinism), "98 %", "§4",
                   "the paper's: from its matrix, one self-loop of 41 transitions"),
        Comparison("states in the dominant cycle", str(len(ours.cycle)), 4, "§4"),
        Comparison("proxy accuracy, alternating, at most training's length", percent(s["in_distribution"].accuracy),
                   "100 %", "§4"),
        Comparison("proxy accuracy, alternating, longer", percent(s["out_of_distribution"].accuracy), "100 %", "§4"),
        Comparison(f"proxy accuracy, random test strings of {n} bits", percent(s["test"].accuracy), "about 93 %", "§4",
                   f"agrees with the model on {percent(s['test'].agreement)}"),
        Comparison("selective proxy accuracy, the same strings", percent(s["test"].selective), None, "D.2",
                   f"{percent(s['test'].coverage)} of them lie within the threshold"),
        Comparison("frequency of logits on half the share of ones, slope", turning.slope, None, "",
                   f"r = {turning.correlation:.3f}; 1 for a state that turns by the share of ones"),
    )  # fmt: skip


def _period(found: Period) -> str:
    return f"autocorrelation {found.correlation:.2f}, p = {found.p_value:.3f}"
