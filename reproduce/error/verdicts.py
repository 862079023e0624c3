"""Whether a claim holds, as the numbers say it: no sentence here is written by hand beside its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepinfluence.evaluation import Estimate

from reproduce.base import Result
from reproduce.error.config import FAMILIES, Config
from reproduce.error.readings import above_bound, bias_test, biases, growth, lemma_numbers, level_slope

DEEP = 20
"""The summary doubts loops of many more steps than this."""


@dataclass(frozen=True)
class Verdict:
    """A claim and what became of it.

    Attributes:
        claim: in words.
        whose: the paper's, the summary's, or ours (theory).
        measured: the numbers that decide.
        holds: ``"yes"``, ``"no"`` or in which cases; ``"not seen"`` where the numbers neither show nor exclude it.
    """

    claim: str
    whose: str
    measured: str
    holds: str


def interval(value: Estimate, digits: int = 2) -> str:
    """``mean [low, high]``."""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def bias_text(found: Mapping[str, Any]) -> str:
    """How many biases are significant, and the largest."""
    return (
        f"{found['significant']} of {found['tests']} significant; largest {100 * found['largest']:.1f} % of the score "
        f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    )


def depth_bias(depth: Mapping[str, Sequence[Result]], config: Config) -> dict[str, Any]:
    """:func:`bias_test` of all sources and families at loops deeper than :data:`DEEP` (at the deepest, if none is)."""
    loops = config.depth.loops
    deep = [k for k, t in enumerate(loops) if t > DEEP] or [len(loops) - 1]
    return bias_test([v for stages in depth.values() for v in biases(stages, deep).values()])


def sparse_bias(structures: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """:func:`bias_test` of all structures, families and shares but the full one."""
    return bias_test(
        [v for stages in structures.values() for v in biases(stages, range(1, len(stages[0]["levels"]))).values()]
    )


def shallow(config: Config) -> int:
    """The deepest number of steps that the summary does not doubt, as an index."""
    return max([k for k, t in enumerate(config.depth.loops) if t <= DEEP and k < len(config.depth.loops) - 1])


def depth_verdicts(depth: Mapping[str, Sequence[Result]], config: Config) -> list[Verdict]:
    """On deep loops."""
    first, loops = shallow(config), config.depth.loops
    grown = {name: growth(stages, "balanced", "relative", first) for name, stages in depth.items()}
    slopes = {name: level_slope(stages, "balanced", "relative", "loops") for name, stages in depth.items()}
    flat = [level_slope(stages, h, "normalised", "loops") for stages in depth.values() for h in FAMILIES]
    over, of, worst = above_bound(list(depth.values()))
    bias = depth_bias(depth, config)
    spans = "; ".join(f"{name} × {interval(one)}" for name, one in grown.items())
    return [
        Verdict(f"sketches are biased in loops of more than {DEEP} steps", "summary", bias_text(bias),
                _in_some(bias["significant"], bias["tests"])),
        Verdict(f"the error relative to the scores grows from τ = {loops[first]} to {loops[-1]} (by a tenth or more)",
                "summary", spans, _grown(grown)),
        Verdict("it grows with the square root of τ at most", "theory",
                f"largest log-log slope {max(s.value for s in slopes.values()):.2f}",
                "yes" if max(s.low for s in slopes.values()) <= 0.5 else "no"),
        Verdict("the error relative to the gradients' norms does not grow with τ", "theory",
                f"log-log slopes {min(s.value for s in flat):.3f} to {max(s.value for s in flat):.3f}",
                "yes" if max(s.value for s in flat) < 0.05 else "no"),
        Verdict("it stays below each family's bound at every τ", "theory",
                f"{over} of {of} above; largest share of the bound {worst:.2f}", "no" if over else "yes"),
    ]  # fmt: skip


def sparsity_verdicts(structures: Mapping[str, Sequence[Result]]) -> list[Verdict]:
    """On sparse gradients."""
    bias = sparse_bias(structures)
    over, of, worst = above_bound(list(structures.values()))
    grown = {name: growth(stages, "iid", "normalised", 0) for name, stages in structures.items()}
    tails = {name: growth(stages, "iid", "kurtosis", 0) for name, stages in structures.items()}
    return [
        Verdict("sketches are biased where gradients are highly sparse", "summary", bias_text(bias),
                _in_some(bias["significant"], bias["tests"])),
        Verdict("sparsity makes the error larger, relative to the gradients' norms (iid, by a tenth or more)",
                "summary", "; ".join(f"{name} × {interval(one)}" for name, one in grown.items()),
                _grown(grown)),
        Verdict("the bound of each family holds at every sparsity", "theory",
                f"{over} of {of} above; largest share of the bound {worst:.2f}", "no" if over else "yes"),
        Verdict("sparsity makes large errors rarer and larger: the kurtosis grows (iid, by a tenth or more)", "theory",
                "; ".join(f"{name} × {interval(one, 1)}" for name, one in tails.items()),
                _grown(tails)),
    ]  # fmt: skip


def lemma_verdicts(stages: Sequence[Result], tight: Result, config: Config) -> list[Verdict]:
    """On Lemma 1."""
    numbers, last = lemma_numbers(stages, config), config.lemma.checkpoints[-1]
    iid, ones = numbers["iid"], tight["iid"]
    exceeds = sum(one["exceeds"] for one in iid)
    others = sum(one["exceeds"] for h in FAMILIES if h != "iid" for one in numbers[h])
    shared = iid[-1]["shared"]
    return [
        Verdict("eq. 12: the mean squared error of K checkpoints with shared hashes is below its right side (iid)",
                "paper", f"{exceeds} of {sum(one['pairs'] for one in iid)} above; at K = {last} the largest is "
                f"{iid[-1]['largest']:.2f} of it, the median {iid[-1]['median']:.2f}", "no" if exceeds else "yes"),
        Verdict("it cannot be improved in general: matrices of ones come close to it (iid)", "paper",
                f"{ones['ratio']:.2f} ± {2 * ones['se']:.2f} of it",
                "yes" if ones["ratio"] + 2 * ones["se"] >= 0.9 else "no"),
        Verdict("balanced and block stay below bounds of their own in the same sum", "theory",
                f"{others} above; largest share "
                + ", ".join(f"{h} {numbers[h][-1]['own']:.2f}" for h in FAMILIES if h != "iid"),
                "no" if others else "yes"),
        Verdict(f"errors of checkpoints that share hashes add up: at K = {last} more than those of independent ones",
                "paper", f"mean squared error × {interval(shared)} (iid), at most {last}",
                "yes" if shared.low > 1 else "not seen"),
    ]  # fmt: skip


def _in_some(count: int, tests: int) -> str:
    return f"in {count} of {tests} cases" if count else "not seen"


def _grown(factors: Mapping[str, Estimate], least: float = 1.1) -> str:
    """For which something grew by a factor of ``least`` or more."""
    names = [name for name, one in factors.items() if one.low > least]
    if names:
        return "for " + ", ".join(names)
    return "no" if all(one.high < least for one in factors.values()) else "not seen"
