"""What the experiment ``uses`` found: tables, rows beside the summary, verdicts, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from stepinfluence.evaluation import Estimate, over_seeds

from reproduce.base import Comparison, Outcome, Result, Run
from reproduce.template import fill
from reproduce.uses import figures
from reproduce.uses.config import Config
from reproduce.uses.curriculum import FIRST, ORDERS
from reproduce.uses.late import EARLY, LATE
from reproduce.uses.probes import REGIMES, TARGETS

RANDOM = "random"


def outcome(run: Run[Config], found: Mapping[str, Sequence[Result]]) -> Outcome:
    """Everything the report shows; arguments are the stages' results by part, one for each seed."""
    late, probe, course = (
        late_numbers(found["late"]),
        probe_numbers(found["probes"]),
        course_numbers(found["curriculum"]),
    )
    rows = (*late_rows(late), *probe_rows(probe), *course_rows(course))
    for name, stages in found.items():
        run.figure(name, getattr(figures, name)(stages))
    text = fill(
        "uses",
        {"config": run.config, "late": late, "probes": probe, "course": course, "rows": rows, "first": FIRST},
    )
    return Outcome(
        title="Uses of influence by loop step, each tried with a control",
        summary=text.summary,
        comparisons=rows,
        body=text.body,
        numbers={name: [dict(stage) for stage in stages] for name, stages in found.items()},
    )


def holds(difference: Estimate) -> str:
    """Whether a difference is positive, as its interval has it."""
    if difference.low > 0:
        return "yes"
    return "no: the reverse" if difference.high < 0 else "not shown: the interval holds zero"


def _over(stages: Sequence[Result], read: Callable[[Any], float]) -> Estimate:
    return over_seeds([read(stage) for stage in stages])


# ----------------------------------------------------------------------------------------------------------------
# Late wrong examples


def late_numbers(stages: Sequence[Result]) -> dict[str, Any]:
    """AUC by what is compared, of what and score; differences of the late steps' from others'."""
    first = stages[0]["auc"]
    auc = {
        what: {
            of: {score: _over(stages, lambda s, w=what, o=of, n=score: s["auc"][w][o][n]) for score in some}  # type: ignore[misc]
            for of, some in kinds.items()
        }
        for what, kinds in first.items()
    }
    gains = {
        what: {of: _gains(stages, what, of) for of in ("self", "queries")} for what in (LATE, f"{LATE} against {EARLY}")
    }
    return {"auc": auc, "gains": gains, "accuracy": _over(stages, lambda s: s["accuracy"])}


def _gains(stages: Sequence[Result], what: str, of: str) -> dict[str, Estimate]:
    """AUC by late steps less that by all steps, by early ones, and by the loss."""
    others = {"all steps": (of, "all steps"), "early steps": (of, "early steps"), "the loss": ("loss", "loss")}
    return {
        name: _over(stages, lambda s, k=kind, o=other: s["auc"][what][of]["late steps"] - s["auc"][what][k][o])  # type: ignore[misc]
        for name, (kind, other) in others.items()
    }


def late_rows(late: Mapping[str, Any]) -> list[Comparison]:
    """Rows beside the summary's claim: found among right ones, and told from examples that are wrong early."""
    names = {"self": "self-influence", "queries": "harm to held-out queries"}
    asked = {
        LATE: "examples that are wrong late among right ones",
        f"{LATE} against {EARLY}": "examples that are wrong late among those that are wrong early",
    }
    rows = []
    for what, question in asked.items():
        for of, name in names.items():
            value, gains = late["auc"][what][of]["late steps"], late["gains"][what][of]
            told = "; ".join(f"than {other} {gain}: {holds(gain)}" for other, gain in gains.items())
            rows.append(
                Comparison(f"{question}: AUC by {name} at late steps", str(value), "they are spotted", "summary",
                           f"more {told}")
            )  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Probes


def probe_numbers(stages: Sequence[Result]) -> dict[str, Any]:
    """Accuracy of probes at the peak, at the other steps, at the last and at the best, by regime and target."""
    found: dict[str, Any] = {}
    for regime in REGIMES:
        found[regime] = {"peaks": [s[regime]["peak"] for s in stages]}
        for target in TARGETS:
            at_peak = [s[regime][target][s[regime]["peak"] - 1] for s in stages]
            others = [float(np.mean(np.delete(s[regime][target], s[regime]["peak"] - 1))) for s in stages]
            found[regime][target] = {
                "peak": over_seeds(at_peak),
                "others": over_seeds(others),
                "gain": over_seeds(np.subtract(at_peak, others)),
                "last": _over(stages, lambda s, r=regime, t=target: s[r][t][-1]),  # type: ignore[misc]
                "best": _over(stages, lambda s, r=regime, t=target: max(s[r][t])),  # type: ignore[misc]
            }
    return found


def probe_rows(probes: Mapping[str, Any]) -> list[Comparison]:
    """Rows beside the summary's claim."""
    rows = []
    for regime, one in probes.items():
        peaks = ", ".join(map(str, one["peaks"]))
        for target in TARGETS:
            gain = one[target]["gain"]
            rows.append(
                Comparison(f"probe for the {target} at the step where influence peaks: accuracy more than at others, "
                           f"{regime}", str(gain), "cleaner signals", "summary",
                           f"peaks at step {peaks} (by seed); better: {holds(gain)}")
            )  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Curriculum


def course_numbers(stages: Sequence[Result]) -> dict[str, Any]:
    """Loss in the mean over training and at the end, and accuracy, by order; differences from the random order."""
    found: dict[str, Any] = {"agreement": _over(stages, lambda s: s["agreement"]), "orders": {}}
    measures: dict[str, Callable[[Any], float]] = {
        "mean": lambda one: float(np.mean(one["losses"])),
        "final": lambda one: one["losses"][-1],
        "accuracy": lambda one: one["accuracy"],
    }
    for order in ORDERS:
        found["orders"][order] = {
            name: {
                "value": _over(stages, lambda s, o=order, f=measure: f(s[o])),  # type: ignore[misc]
                "gain": _over(stages, lambda s, o=order, f=measure: f(s[o]) - f(s[RANDOM])),  # type: ignore[misc]
            }
            for name, measure in measures.items()
        }
    return found


def course_rows(course: Mapping[str, Any]) -> list[Comparison]:
    """Rows beside the summary's claim."""
    rows = []
    for order, one in course["orders"].items():
        if order == RANDOM:
            continue
        lower = one["mean"]["gain"]
        verdict = holds(Estimate(-lower.value, -lower.high, -lower.low))
        paper = "accelerates" if order == "by profile" else None
        rows.append(
            Comparison(f"curriculum {order}: held-out loss over training, less random growth's", str(lower), paper,
                       "summary" if paper else "", f"nats; at the end {one['final']['gain']}; faster: {verdict}")
        )  # fmt: skip
    return rows
