"""What the campaigns have found, counted: a table for the terminal, and JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.attack.campaign import Campaign
from bench.attack.verdicts import BAD, GOOD, Verdict

SHOWN = 5
"""Bad inputs that are kept of each campaign and kind, beside the number of all."""


@dataclass
class Count:
    """Of one campaign."""

    campaign: Campaign
    verdicts: Counter[str] = field(default_factory=Counter)
    bad: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    kills: int = 0
    seconds: float = 0.0

    def add(self, seed: int, verdict: Verdict) -> None:
        self.verdicts[verdict.kind] += 1
        self.kills += verdict.kills
        if verdict.bad and len(kept := self.bad.setdefault(verdict.kind, [])) < SHOWN:
            kept.append((seed, verdict.detail[:600]))

    @property
    def inputs(self) -> int:
        return sum(self.verdicts.values())

    @property
    def bad_count(self) -> int:
        return sum(self.verdicts[kind] for kind in BAD)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.campaign.what,
            "inputs": self.inputs,
            "mutated": self.campaign.mutated,
            "kills": self.kills,
            "seconds": round(self.seconds, 1),
            "verdicts": {kind: self.verdicts[kind] for kind in (*GOOD, *BAD) if self.verdicts[kind]},
            "bad": [
                {"verdict": kind, "seed": seed, "detail": detail}
                for kind, kept in self.bad.items()
                for seed, detail in kept
            ],
        }


@dataclass
class Report:
    """Of all campaigns."""

    counts: dict[str, Count] = field(default_factory=dict)

    def of(self, campaign: Campaign) -> Count:
        return self.counts.setdefault(campaign.name, Count(campaign))

    @property
    def bad(self) -> int:
        return sum(count.bad_count for count in self.counts.values())

    def as_json(self, facts: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
        """Totals, verdicts in words, and each campaign's counts with some of its bad inputs.

        Args:
            facts: where the campaigns that were run now come from.
            earlier: campaigns as a report holds them, kept where they were not run now.
        """
        campaigns = {**earlier, **{name: {**count.as_json(), **facts} for name, count in self.counts.items()}}
        counts = list(campaigns.values())
        return {
            "mutated inputs": sum(c["inputs"] for c in counts if c["mutated"]),
            "other inputs": sum(c["inputs"] for c in counts if not c["mutated"]),
            "kills": sum(c["kills"] for c in counts),
            "bad": {kind: sum(c["verdicts"].get(kind, 0) for c in counts) for kind in BAD},
            "verdicts": {**GOOD, **BAD},
            "campaigns": campaigns,
        }

    def lines(self) -> list[str]:
        """A table, and below it the bad inputs with what repeats them."""
        shown = [f"{'campaign':<12} {'inputs':>8} {'kills':>6} {'bad':>6}  verdicts"]
        for name, count in self.counts.items():
            parts = ", ".join(f"{count.verdicts[kind]:,} {kind}" for kind in (*GOOD, *BAD) if count.verdicts[kind])
            shown.append(f"{name:<12} {count.inputs:>8,} {count.kills:>6,} {count.bad_count:>6,}  {parts}")
        for name, count in self.counts.items():
            for kind, kept in count.bad.items():
                shown.append(f"BAD  {name}: {count.verdicts[kind]:,} {kind} ({BAD[kind]})")
                shown += [f"     --replay {name}:{seed}  {detail}" for seed, detail in kept]
        return shown
