"""``python -m bench.peers``: every library in a process of its own, and a table (Markdown) of how each fared."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers.model import D_MODEL, QUERY, STEPS, TOKENS, TRAIN
from bench.provenance import Provenance, add_output, machine_line, write

LIBRARIES = ["stepinfluence", "sdi", "captum", "dattri", "dattri_llm", "kronfluence", "bergson", "trak"]
TIMEOUT = 120

COLUMNS = [
    "library",
    "use",
    "step-resolved",
    "parameters seen",
    "error",
    "rank corr.",
    "error by step",
    "verdict",
    "error without loop",
    "seconds",
    "× plain",
]


def run(library: str, timeout: float) -> dict[str, Any]:
    """The worker's result, or what happened to it."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, "-m", "bench.peers.worker", library, str(result)]
        with log.open("wb") as stream:
            try:
                # In a folder of its own: some libraries write where they stand.
                done = subprocess.run(
                    command,
                    stdout=stream,
                    stderr=stream,
                    timeout=timeout,
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"missing": f"no result after {timeout:g} s", "asks": []}
        if not result.exists():
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            return {"missing": f"exit status {done.returncode}: {' '.join(last)}"[:300], "asks": []}
        parsed: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return parsed


def _number(value: object) -> str:
    if not isinstance(value, float):
        return "–" if value is None else "raises"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def _row(library: str, version: str, ask: dict[str, Any]) -> list[str]:
    error = _number(ask.get("error"))
    if ask.get("noise"):
        error += f" (expected {_number(ask['noise'])})"
    seconds = ask.get("seconds")
    return [
        f"{library} {version}",
        ask["label"],
        "yes" if ask["step_resolved"] else "no",
        "all" if ask["covers"] == ask["of"] else f"{ask['covers']} of {ask['of']}",
        error,
        "–" if "rank" not in ask else f"{ask['rank']:.3f}",
        _number(ask.get("step_error")),
        f"**{ask['verdict']}**",
        _number(ask["control"]),
        "–" if seconds is None else f"{seconds:.2f}",
        "–" if seconds is None else f"{seconds / ask['plain_seconds']:.1f}",
    ]


def _details(library: str, ask: dict[str, Any]) -> str:
    parts = [f"{library}, {ask['label']}: {ask['what']}."]
    if ask["definition_note"]:
        parts.append(f"Compared with {ask['definition_note']}.")
    if ask["scale_note"]:
        parts.append(f"Scale: {ask['scale_note']}.")
    if ask.get("raised"):
        parts.append(f"Raises `{ask['raised']}`.")
    if ask["verdict"] == "wrong" and "slope" in ask:
        parts.append(f"{ask['slope']:.2f} times the exact scores (least squares).")
    if ask.get("explanation"):
        parts.append(f"Equals, to fp32: {ask['explanation']}.")
    if ask["control_verdict"] == "raises":
        parts.append(f"Without a loop it raises `{ask['control']}`.")
    if ask["note"]:
        parts.append(f"Note: {ask['note']}.")
    return "- " + " ".join(parts)


def markdown(results: dict[str, Any]) -> str:
    """The table, and what was asked, of results by library."""
    shape = f"d = {D_MODEL}, applied {STEPS} times to {TOKENS} tokens"
    lines = [
        f"Model: one transformer block, {shape}; {TRAIN} training and {QUERY} query examples.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    details = []
    for library, result in results.items():
        if "missing" in result:
            lines.append(f"| {library} | {result['missing']} |{' |' * (len(COLUMNS) - 2)}")
        for ask in result["asks"]:
            lines.append(f"| {' | '.join(_row(library, result['version'], ask))} |")
            details.append(_details(library, ask))
    return "\n".join([*lines, "", "What was asked, and what came back:", "", *details])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each library")
    add_output(parser, "peers")
    options = parser.parse_args()
    provenance = Provenance()
    results = {}
    for library in options.libraries:
        print(f"running {library} ...", file=sys.stderr, flush=True)
        results[library] = run(library, options.timeout)
    print(f"{markdown(results)}\n\n{machine_line(provenance.finish())}")
    write(options.json, provenance, {"libraries": results})


if __name__ == "__main__":
    main()
