"""What a run has found, counted, and as a report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.fuzz.check import Outcome
from bench.fuzz.spec import KINDS, Spec, load

SHOWN = 3
"""Seeds kept of a reason."""


@dataclass
class Wrong:
    """A wrong number: the seed it was drawn from, the capture that gave it, and its spec before and after shrinking."""

    seed: int
    capture: str
    outcome: Outcome
    spec: Spec
    minimal: Spec | None = None
    minimal_outcome: Outcome | None = None

    @property
    def kinds(self) -> list[str]:
        """Of the smallest spec that is known."""
        return (self.minimal or self.spec).kinds() or ["none of these"]

    def as_json(self) -> dict[str, Any]:
        kept = self.minimal or self.spec
        return {
            "seed": self.seed,
            "capture": self.capture,
            "verdict": self.outcome.verdict,
            "error": self.outcome.error,
            "kinds": kept.kinds(),
            "made of": sorted(kept.features()),
            "shrunk": self.minimal is not None,
            "error shrunk": None if self.minimal_outcome is None else self.minimal_outcome.error,
            "spec": kept.dump(),
        }


def from_json(data: dict[str, Any]) -> Wrong:
    """What :meth:`Wrong.as_json` wrote, but for the spec before shrinking."""
    spec, outcome = load(data["spec"]), Outcome(data["verdict"], error=data["error"])
    shrunk = Outcome(data["verdict"], error=data["error shrunk"]) if data["shrunk"] else None
    return Wrong(data["seed"], data["capture"], outcome, spec, spec if data["shrunk"] else None, shrunk)


@dataclass
class Reason:
    """How often a capture gave it, and the seeds of a few models that show it."""

    count: int = 0
    seeds: list[int] = field(default_factory=list)

    def add(self, seed: int) -> None:
        self.count += 1
        if len(self.seeds) < SHOWN:
            self.seeds.append(seed)


@dataclass
class Tally:
    """Counts by capture, verdict and reason; the wrong models; an example of every reason."""

    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[tuple[str, str, str], Reason] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    models: int = 0
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: {k: Counter() for k in (*KINDS, "none of these")})

    def add(self, seed: int, spec: Spec, found: dict[str, Outcome]) -> None:
        self.models += 1
        for kind in spec.kinds() or ["none of these"]:
            self.kinds[kind][found["sketched"].verdict] += 1
        for capture, outcome in found.items():
            self.verdicts.setdefault(capture, Counter())[outcome.verdict] += 1
            if outcome.reason:
                self.reasons.setdefault((capture, outcome.verdict, outcome.reason), Reason()).add(seed)
            if outcome.bad:
                self.wrong.append(Wrong(seed, capture, outcome, spec))

    def refused(self, capture: str = "sketched") -> float:
        """Share of the models that autograd on one example handles, and this capture does not."""
        counts = self.verdicts.get(capture, Counter())
        handled = sum(counts[v] for v in ("right", "refused", "crashed", "wrong"))
        return (counts["refused"] + counts["crashed"]) / max(1, handled)

    def as_json(self) -> dict[str, Any]:
        """The report, from which :meth:`of_json` makes this again."""
        return {
            "models": self.models,
            "verdicts": {capture: dict(counts) for capture, counts in self.verdicts.items()},
            "refused share": {capture: round(self.refused(capture), 4) for capture in self.verdicts},
            "verdicts of sketches by kind": {kind: dict(counts) for kind, counts in self.kinds.items()},
            "reasons": [
                {"capture": capture, "verdict": verdict, "reason": reason, "count": found.count, "seeds": found.seeds}
                for (capture, verdict, reason), found in self.ordered()
            ],
            "minimal": self.minimal(),
            "wrong": [wrong.as_json() for wrong in self.wrong],
        }

    @classmethod
    def of_json(cls, report: dict[str, Any]) -> Tally:
        """What a report says, so that a run can go on; wrong models are known by their kept specs."""
        kinds = {kind: Counter(counts) for kind, counts in report["verdicts of sketches by kind"].items()}
        verdicts = {capture: Counter(counts) for capture, counts in report["verdicts"].items()}
        reasons = {
            (r["capture"], r["verdict"], r["reason"]): Reason(r["count"], list(r["seeds"])) for r in report["reasons"]
        }
        return cls(verdicts, reasons, [from_json(data) for data in report["wrong"]], report["models"], kinds)

    def ordered(self) -> list[tuple[tuple[str, str, str], Reason]]:
        """Reasons, the most frequent first."""
        return sorted(self.reasons.items(), key=lambda item: -item[1].count)

    def minimal(self) -> dict[str, list[dict[str, Any]]]:
        """Shrunk wrong models by kind; of those with several kinds, nothing tells which one it is."""
        found: dict[str, list[dict[str, Any]]] = {}
        for wrong in self.wrong:
            if wrong.minimal is not None and len(wrong.kinds) == 1:
                found.setdefault(wrong.kinds[0], []).append(wrong.as_json())
        return found

    def lines(self) -> list[str]:
        """For the terminal: verdicts, refusals by reason, wrong models by what their minimal spec is made of."""
        shown = [f"{self.models} models"]
        for capture, counts in self.verdicts.items():
            parts = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
            shown.append(f"{capture}: {parts}; refused {100 * self.refused(capture):.1f} %")
        for (capture, verdict, reason), found in self.ordered():
            shown.append(f"{found.count:>6}  {capture} {verdict} (seed {found.seeds[0]}): {reason}")
        for wrong in self.wrong:
            kept, outcome = wrong.minimal or wrong.spec, wrong.minimal_outcome or wrong.outcome
            name = ", ".join(kept.kinds()) or "no known kind"
            shown.append(f"WRONG  {wrong.capture} seed {wrong.seed}, {outcome.verdict} {outcome.error:.1e}, {name}:")
            shown.append(f"       {kept.dump()}")
        return shown
