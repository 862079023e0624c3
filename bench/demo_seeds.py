"""Does the demonstration show what the README says it shows, whatever the seed and the CPU's instructions?

    python -m bench.demo_seeds                                      # seeds 0 to 9, every capability this CPU has
    python -m bench.demo_seeds --seeds 10-14 --capabilities default
    python -m bench.demo_seeds --table bench/results/demo-seeds-amd-epyc.json

A cell is one run of `sdi demo --seed N` in a process of its own, with torch limited to a set of vector instructions by
ATEN_CPU_CAPABILITY. It takes a few minutes of one core. Cells are kept in --work as soon as they are done, and not run
again: interrupt the command and repeat it as you like. A cell whose settings are no longer the demo's is run again.

Columns:
  accuracy  lowest of the lengths that were asked about: those of the queries, the probe's among them
  solved    that, and the mean over the lengths of training, reach 99 %
  share     the largest of a checkpoint in the plain sum over checkpoints, of the probe 0101...
  example   the largest of a training example in the view that is shown first, of the same probe
  period    of the probe's influence, summed over examples (the paper's profile, appendix D.2), in the view shown
            first; p of a permutation test; said to be found where p <= 0.01
  energy    the same regardless of sign
  SDI       the same as period, of the paper's scores, without curvature
  margin    the same of the logit margin

What is kept: bench/results/demo-seeds-<CPU>.json with the cells, how many of them are solved and show period 4, and the
machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from stepinfluence.app.demo.data import DemoConfig
from stepinfluence.attribution.periods import Period
from stepinfluence.files import write_bytes
from stepinfluence.machine import cpu_model

from bench.provenance import ROOT, Provenance, machine_line

WANTED_PERIOD = 4
"""The paper's, for strings that alternate (Figure 1A)."""

ORDER = ("default", "avx2", "avx512")
Cell = dict[str, Any]
Runner = Callable[[int, str], Cell]


def capabilities() -> tuple[str, ...]:
    """What this CPU can be limited to, in torch's words, least first."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return ORDER[: ORDER.index(best) + 1] if best in ORDER else ORDER[:1]


def run_cell(seed: int, capability: str) -> Cell:
    """Run the demo in a process of its own.

    Raises:
        RuntimeError: it did not get to its end, or torch does not use these instructions.
    """
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    used = _python(["-c", "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"], environment)
    if used.stdout.strip() != capability:
        raise RuntimeError(f"capabilities: asked for {capability}, but torch uses {used.stdout.strip()} here")
    provenance = Provenance()
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "stepinfluence", "demo", "--seed", str(seed), "--json", "--out", f"{folder}/demo"]
        done = _python(command, environment)
        try:
            found = json.loads(done.stdout)
            config = json.loads(Path(f"{folder}/demo/config.json").read_text(encoding="utf-8"))["config"]
        except (ValueError, OSError) as error:
            raise RuntimeError(f"sdi demo --seed {seed} failed:\n{done.stderr[-2000:]}") from error
    return {**cell_of(found), "seed": seed, "capability": capability, "config": config,
            "provenance": provenance.finish()}  # fmt: skip


def _python(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def cell_of(found: Mapping[str, Any]) -> Cell:
    """What the table needs of `sdi demo --json`."""
    probe = found["queries"][0]
    known = {**found["accuracy"], **found["accuracy_beyond_training"]}
    asked = sorted({len(q["text"]) - 1 for q in found["queries"]})
    return {
        "solved": found["solved"],
        "asked": {str(n): known[str(n)] for n in asked},
        "accuracy": known,
        "probe_bits": len(probe["text"]) - 1,
        "largest_share": max(probe["checkpoint_shares"]),
        "largest_example": probe["largest_example"],
        "dominated_by": probe["dominated_by"],
        "periods": probe["periods"],
        "sdi_error": found["sdi_error"],
        "seconds": round(sum(s["seconds"] for s in found["stages"]), 1),
        "cpu_seconds": round(sum(s["cpu_seconds"] for s in found["stages"]), 1),
    }


def collect(cells: Sequence[tuple[int, str]], work: Path, run: Runner, say: Callable[[str], None]) -> list[Cell]:
    """All cells, those in `work` as they are and the others run and kept there."""
    work.mkdir(parents=True, exist_ok=True)
    done = []
    for seed, capability in cells:
        path = work / f"seed-{seed}-{capability}.json"
        cell = _kept(path, seed)
        if cell is None:
            say(f"seed {seed}, {capability} ...")
            cell = run(seed, capability)
            write_bytes(path, (json.dumps(cell, indent=1) + "\n").encode())
        done.append(cell)
        say(" ".join(row(cell)))
    return done


def _kept(path: Path, seed: int) -> Cell | None:
    try:
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cell if cell.get("config") == settings(seed) else None


def settings(seed: int) -> dict[str, Any]:
    """The demo's settings as its config.json has them."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(DemoConfig.full(seed=seed))))
    return content


def shows_period(cell: Cell, which: str = "profile") -> bool:
    """Whether the test found the paper's period in a curve of the probe."""
    found = Period(**cell["periods"][which])
    return found.found and found.lag == WANTED_PERIOD


def summary(cells: Sequence[Cell]) -> dict[str, dict[str, int]]:
    """Counts by capability."""
    return {
        capability: {
            "runs": len(mine),
            "solved": sum(c["solved"] for c in mine),
            "period_of_4": sum(map(shows_period, mine)),
            "energy_period_of_4": sum(shows_period(c, "energy") for c in mine),
            "plain_period_of_4": sum(shows_period(c, "plain_profile") for c in mine),
            "plain_energy_period_of_4": sum(shows_period(c, "plain_energy") for c in mine),
            "both": sum(c["solved"] and shows_period(c) for c in mine),
        }
        for capability in dict.fromkeys(c["capability"] for c in cells)
        if (mine := [c for c in cells if c["capability"] == capability])
    }


PERIODS = {"period": "profile", "energy": "energy", "SDI": "plain_profile", "margin": "margin"}
HEADER = ["seed", "capability", "probe", "accuracy", "solved", "share", "example"]
HEADER += [text for name in PERIODS for text in (name, "p")]


def row(cell: Cell) -> list[str]:
    """A line of the table."""
    periods = [Period(**cell["periods"][name]) for name in PERIODS.values()]
    return [
        str(cell["seed"]),
        cell["capability"],
        f"{cell['probe_bits']} bits",
        f"{100 * min(cell['asked'].values()):.1f} %",
        "yes" if cell["solved"] else "NO",
        f"{cell['largest_share']:.2f}",
        f"{cell['largest_example']:.2f}",
        *(text for p in periods for text in (str(p.lag) if p.found else "none", f"{p.p_value:.3f}")),
    ]


def table(cells: Sequence[Cell]) -> str:
    """For a terminal, or as Markdown."""
    rows = [HEADER, *map(row, cells)]
    widths = [max(len(r[k]) for r in rows) for k in range(len(HEADER))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    for capability, counts in summary(cells).items():
        lines.append(
            f"{capability}: {counts['solved']} of {counts['runs']} solved, {counts['period_of_4']} of {counts['runs']} "
            f"show period {WANTED_PERIOD} in the default view (regardless of sign "
            f"{counts['energy_period_of_4']}; without curvature {counts['plain_period_of_4']} and "
            f"{counts['plain_energy_period_of_4']}), {counts['both']} both"
        )
    return "\n".join(lines)


def seeds_of(text: str) -> list[int]:
    """`0-9` or `3` as numbers."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a seed (3) or a range (0-9)")
    return list(range(int(match[1]), int(match[2] or match[1]) + 1))


def main(arguments: Sequence[str] | None = None, run: Runner = run_cell) -> int:
    """The command; 0 when every cell was measured, whatever it showed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=list(range(10)), metavar="A[-B]", help="default: 0-9")
    parser.add_argument("--capabilities", nargs="+", choices=ORDER, default=None, help="default: all this CPU has")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-seeds", help="where cells are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a kept result, run nothing")
    given = parser.parse_args(arguments)
    if given.table is not None:
        kept = json.loads(given.table.read_text(encoding="utf-8"))
        print(table(kept["cells"]), machine_line(kept["provenance"]), sep="\n")
        return 0
    chosen = tuple(given.capabilities or capabilities())
    wanted = [(seed, capability) for seed in given.seeds for capability in chosen]
    provenance = Provenance()
    cells = collect(wanted, given.work, run, lambda text: print(text, file=sys.stderr, flush=True))
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    path = given.out / f"demo-seeds-{slug}.json"
    content: dict[str, Any] = {"provenance": provenance.finish(), "summary": summary(cells), "cells": cells}
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(cells), machine_line(content["provenance"]), f"kept in {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
