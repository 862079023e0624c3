"""An experiment's outcome as ``report.md``, ``report.html`` (self-contained) and ``results.json``."""

from __future__ import annotations

import base64
import html
import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepinfluence.machine import machine_facts, versions

from reproduce import EXPERIMENTS, SCALES
from reproduce.base import Outcome, Run, plain_values
from reproduce.differences import differences

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #e3e1da; padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; } code, pre { background: #f5f4f0; padding: .1em .3em; border-radius: 3px; }
pre { padding: .8em; overflow-x: auto; }
"""


def write_report(run: Run[Any], outcome: Outcome, command: str) -> Path:
    """Write the three files into the run's folder; returns the path of ``report.html``.

    Args:
        run: finished.
        outcome: what it found.
        command: how to make it again.
    """
    text = markdown(run, outcome, command)
    (run.folder / "report.md").write_text(text, encoding="utf-8")
    (run.folder / "results.json").write_text(json.dumps(_results(run, outcome, command), indent=1) + "\n", "utf-8")
    path = run.folder / "report.html"
    path.write_text(_page(outcome.title, text, run.folder), encoding="utf-8")
    return path


def markdown(run: Run[Any], outcome: Outcome, command: str) -> str:
    """The report as Markdown, with figures by relative path."""
    wall = sum(t["seconds"] for t in run.timings.values())
    cpu = sum(t["cpu_seconds"] for t in run.timings.values())
    facts = machine_facts()
    machine = f"{facts['CPU']}, {facts['cores']} cores; {facts['torch threads']} torch thread(s); GPU: " + next(
        (v for k, v in facts.items() if k.startswith("GPU")), "none"
    )
    lines = [f"# {outcome.title}", "", outcome.summary.strip(), ""]
    lines += ["```", command, "```", "", f"Scale `{run.scale}`: {SCALES.get(run.scale, 'own settings')}.", ""]
    if outcome.comparisons:
        lines += ["## Beside the paper", "", "| quantity | ours | paper | where | remark |", "|---|---|---|---|---|"]
        for c in outcome.comparisons:
            cells = (c.name, number(c.ours), "–" if c.paper is None else number(c.paper), c.where, c.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += [outcome.body.strip(), ""]
    lines += [] if outcome.tells_differences else _below_the_paper(run)
    lines += ["## How it was run", "", f"Machine: {machine}.", ""]
    lines += [f"Computing took {wall:.0f} s by the clock and {cpu:.0f} s of processor time:", ""]
    lines += ["| stage | seconds | processor seconds |", "|---|---|---|"]
    lines += [f"| {name} | {t['seconds']:.1f} | {t['cpu_seconds']:.1f} |" for name, t in run.timings.items()]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items() if v != "not installed") + "."]
    return "\n".join(lines) + "\n"


def _below_the_paper(run: Run[Any]) -> list[str]:
    """A table of what differs from the ``paper`` scale; nothing at that scale or for settings of the caller's own."""
    if run.scale == "paper" or run.experiment not in EXPERIMENTS:
        return []
    configs = importlib.import_module(f"{EXPERIMENTS[run.experiment].package}.config").CONFIGS
    rows = differences(plain_values(asdict(run.config)), plain_values(asdict(configs["paper"])))
    lines = ["## What differs from the paper's scale", "", "Settings as the code names them.", ""]
    lines += ["| setting | here | `--scale paper` |", "|---|---|---|"]
    return [*lines, *(f"| `{name}` | {ours} | {theirs} |" for name, ours, theirs in rows), ""]


def number(value: float | str) -> str:
    """Three significant digits; text as it is."""
    return value if isinstance(value, str) else f"{value:.3g}"


def _results(run: Run[Any], outcome: Outcome, command: str) -> dict[str, Any]:
    config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    if config["config"].get("data"):  # the name of the user's data, not where it lies
        config["config"]["data"] = Path(config["config"]["data"]).name
    return {
        **config,
        "command": command,
        "comparisons": [vars(c) for c in outcome.comparisons],
        "numbers": dict(outcome.numbers),
        "timings": {name: dict(t) for name, t in run.timings.items()},
        "provenance": {**run.provenance.finish(command), "stages": dict(run.sources)},
    }


def _page(title: str, text: str, folder: Path) -> str:
    from markdown_it import MarkdownIt

    # Raw HTML stays text: reports quote data.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for picture in sorted((folder / "figures").glob("*.png")) if (folder / "figures").is_dir() else ():
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="figures/{picture.name}"', f'src="data:image/png;base64,{data}"')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
