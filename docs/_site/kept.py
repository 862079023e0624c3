"""Kept results, and the parts of pages that are made from them.

A page has ``<!-- figures: NAME -->`` before a part and ``<!-- /figures -->`` after it. What lies between is what
the function of that name returns, so that no measured figure is typed by hand.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
EXPERIMENTS = ROOT / "docs" / "results"
MARK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)

sys.path.insert(0, str(ROOT))

Parts = dict[str, Callable[[], str]]

KINDS = (
    "attack", "calls", "capture", "curvature-cost", "explore", "host-overhead", "inline", "install", "integrations",
    "kronecker-adder", "kronecker-language", "kronecker-majority", "kronecker-trm", "ladder-language",
    "ladder-majority", "ladder-trm", "large", "models", "paper-batch", "peers", "per-example", "scale", "search",
    "sketch", "sketch-sizes", "soak", "startup", "steps-removed-language", "steps-removed-majority",
    "store-layouts", "training", "uses-cancellation", "uses-curation", "uses-horizon", "uses-mislabelled",
    "variance-table", "workspace",
)  # fmt: skip
"""The results that ``python -m bench.keep`` makes."""


class NotKeptError(Exception):
    """There is no kept result of a kind."""


def load(name: str) -> dict[str, Any]:
    """A kept result of the bench commands.

    Raises:
        NotKeptError: there is none.
    """
    if not (RESULTS / name).is_file():
        raise NotKeptError(name.removesuffix(".json"))
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def machines(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(name of the file, result) of every machine that a command was kept for.

    Raises:
        NotKeptError: there is none.
    """
    others = {f"{name}.json" for name in KINDS}
    names = sorted(path.name for path in RESULTS.glob(f"{kind}-*.json") if path.name not in others)
    if not names:
        raise NotKeptError(kind)
    return [(name, load(name)) for name in names]


def comparison(experiment: str, name: str) -> str:
    """Our number beside the paper's, as the experiment's report has it."""
    results = json.loads((EXPERIMENTS / experiment / "results.json").read_text(encoding="utf-8"))
    [ours] = [c["ours"] for c in results["comparisons"] if c["name"] == name]
    return ours if isinstance(ours, str) else f"{ours:.3g}"


def source(name: str, page_is_root: bool, result: Mapping[str, Any]) -> str:
    """Where figures come from, in one sentence for the reader."""
    from bench.provenance import machine_line

    link = f"bench/results/{name}" if page_is_root else f"`bench/results/{name}`"
    text = f"[{link}]({link})" if page_is_root else link
    return f"{text}: `{result['provenance']['command']}`; {machine_line(result['provenance'])}."


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if k != 1 else f"|{line}|" for k, line in enumerate(lines))


def folded(summary: str, *texts: str) -> str:
    """Texts that open at a click, on the site and on GitHub: for tables that few readers need."""
    return "\n\n".join([f'<details markdown="1"><summary>{summary}</summary>', *texts, "</details>"])


def mean(values: list[float]) -> float:
    return statistics.mean(values)


def span(values: list[float], digits: int = 2) -> str:
    """Smallest to largest."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def mib(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f}"


def rewritten(text: str, parts: Parts) -> str:
    """A page with its parts made anew.

    Raises:
        KeyError: the page has a part that nothing makes.
    """
    return MARK.sub(lambda m: f"{m[1]}{_made(parts[m[2]])}\n{m[4]}", text)


def _wrapped(block: str) -> str:
    """Lines of at most 120 characters, but for tables, code, images and where something is folded."""
    if block.startswith(("|", "```", "<details", "![")):
        return block
    lines = block.split("\n") if block.startswith("- ") else [block]
    options = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(line, subsequent_indent="  " if line.startswith("- ") else "", **options)  # type: ignore[arg-type]
        for line in lines
    )


def _made(part: Callable[[], str]) -> str:
    try:
        return "\n\n".join(_wrapped(block) for block in part().strip().split("\n\n"))
    except NotKeptError as missing:
        return f"*Not measured since results carry their provenance; `python -m bench.keep {missing}` does it.*"
