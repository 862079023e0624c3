"""Write docs/reproduction.md: the paper's numbers beside ours, from the results of the runs in docs/results.

python docs/_site/reproduction.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ORDER = ("fidelity", "parity", "sudoku", "nanochat", "tasks")

HEAD = """# Reproduction

The paper's experiments (Kaissis et al., arXiv 2602.10097), each by one command, and its numbers beside ours. Every
table below is taken from the `results.json` of a run that is kept under `docs/results` with its command, machine, seed
and time; each has a report with figures and an analysis of what differs.

    sdi reproduce {fidelity,parity,sudoku,nanochat,tasks} --scale cpu     # at most 45 minutes on two cores
    sdi reproduce ... --scale paper                                       # the paper's configuration, for a GPU

**What was run**: the `cpu` scale of each experiment below, on two cores of an AMD EPYC that was shared with other work.
**What was not run**: the `paper` scale of any, for want of a GPU. Models and tasks are smaller: directions and ratios
can be compared, absolute values cannot.
"""

TAIL = """
The last table has no paper behind it: a summary of the paper claims results on algorithmic tasks that the paper itself
does not have, without a protocol. We define one and report what comes out.
"""


def page() -> str:
    """The page as text."""
    parts = [HEAD]
    for name in ORDER:
        path = DOCS / "results" / name / "results.json"
        if path.is_file():
            parts.append(_section(name, json.loads(path.read_text(encoding="utf-8"))))
        else:
            parts.append(f"\n## {name}\n\nNot run yet.\n")
    return "".join([*parts, TAIL])


def _section(name: str, results: dict[str, Any]) -> str:
    cpu = sum(t["cpu_seconds"] for t in results["timings"].values())
    wall = sum(t["seconds"] for t in results["timings"].values())
    took = f"{cpu / 60:.0f} minutes of processor time, {wall / 60:.0f} by the clock"
    lines = [
        f"\n## {name}\n",
        f"`{results['command']}`: {took}. [Report with figures](results/{name}/report.md).\n",
        "| quantity | ours | paper | where | remark |",
        "|---|---|---|---|---|",
    ]
    for c in results["comparisons"]:
        cells = (
            c["name"],
            _number(c["ours"]),
            "–" if c["paper"] is None else _number(c["paper"]),
            c["where"],
            c["note"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    (DOCS / "reproduction.md").write_text(page(), encoding="utf-8")
