"""What `make attack` and `make soak` have found, in docs/reliability.md."""

# ruff: noqa: E501  # sentences of the pages
from __future__ import annotations

from typing import Any

from kept import Parts, load, source, table


def _counted(campaign: dict[str, Any], kinds: list[str]) -> str:
    return ", ".join(f"{campaign['verdicts'][kind]:,} {kind}" for kind in kinds if campaign["verdicts"].get(kind))


def attack() -> str:
    """Counts of every campaign, and what the same campaigns found before the mends."""
    now, before = load("attack.json"), load("attack-before.json")["campaigns"]
    good = [kind for kind in now["verdicts"] if kind not in now["bad"]]
    rows = []
    for name, campaign in now["campaigns"].items():
        was = before.get(name)
        rows.append([
            f"`{name}`: {campaign['what']}",
            f"{campaign['inputs']:,}",
            f"{campaign['kills']:,}" if campaign["kills"] else "",
            _counted(campaign, good),
            _counted(campaign, list(now["bad"])) or "none",
            "" if was is None else f"{_counted(was, list(now['bad'])) or 'none'} of {was['inputs']:,}",
        ])  # fmt: skip
    bad = sum(now["bad"].values())
    commits = sorted({c["provenance"]["commit"][:12] for c in now["campaigns"].values()})
    head = ["campaign", "inputs", "kills", "as promised", "otherwise", "otherwise, before the mends"]
    words = ", ".join(f"{kind}: {text}" for kind, text in now["verdicts"].items())
    return (
        f"The runs that are kept: {now['mutated inputs']:,} mutated inputs (of requests and calls some are left whole, as controls), and {now['other inputs']:,} in which commands were "
        f"disturbed, with {now['kills']:,} kills; {bad if bad else 'none'} ended otherwise than promised. "
        "Campaigns were run side by side, and one that found something again after the mend, with other seeds; each has its command, "
        "seeds, commit and load in the file, of which the last "
        f"one's are: {source('attack.json', False, now)} Commits: {', '.join(commits)}.\n\n{table(head, rows)}\n\n{words[0].upper()}{words[1:]}."
    )


def soak() -> str:
    r = load("soak.json")
    left = "nothing" if r["held_before"] == r["held_after"] else f"{r['held_after']} after {r['held_before']}"
    grown = "n/a" if r["growth_mib"] is None else f"{r['growth_mib']:.1f} MiB"
    hour = "" if r["minutes"] >= 60 else " An hour has not been run."
    return (
        f"The run that is kept: {r['rounds']} rounds in {r['minutes']:g} minutes; memory grew by {grown} between the first and "
        f"the last quarter; of hooks, files, threads and processes {left} was left. {source('soak.json', False, r)}{hour}"
    )


PARTS: Parts = {"attack": attack, "soak": soak}
