"""What influence by step is good for, measured over seeds: docs/uses.md is made from what this keeps.

    python -m bench.uses mislabelled --keep      # also: curation, horizon, cancellation
    python -m bench.uses curation --draw         # the figure again, from the kept result

Each is the script of ``examples/`` of that question, run for every seed (of data and training both). A few minutes
each on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.provenance import RESULTS, ROOT, Provenance, add_output, write
from bench.uses import pictures

sys.path.insert(0, str(ROOT / "examples"))

import depth_targeted_selection
import influence_horizon
import mislabel_triage
import signal_cancellation

PROBLEMS = ("adder", "majority")
TRAINED = (4, 8)
"""Loop counts that models of the horizon are trained with."""

Measure = Callable[[int], dict[str, Any]]

USES: dict[str, Measure] = {
    "mislabelled": lambda seed: {name: mislabel_triage.measure(name, seed) for name in PROBLEMS},
    "curation": depth_targeted_selection.measure,
    "horizon": lambda seed: {
        f"{name}, trained with {steps}": influence_horizon.measure(name, steps, seed)
        for name in PROBLEMS
        for steps in TRAINED
    },
    "cancellation": lambda seed: {name: signal_cancellation.measure(name, seed) for name in PROBLEMS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("use", choices=USES)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="only draw the kept result")
    known, _ = parser.parse_known_args()
    add_output(parser, f"uses-{known.use}")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    if not options.draw:
        provenance, runs = Provenance(), []
        for seed in range(options.seeds):
            runs.append(USES[options.use](seed))
            print(f"seed {seed}: {json.dumps(runs[-1])}", flush=True)
        write(options.json, provenance, {"seeds": list(range(options.seeds)), "runs": runs})
    kept = RESULTS / f"uses-{options.use}.json"
    if options.draw or options.json == kept:
        picture = ROOT / "docs" / "images" / f"uses-{options.use}.png"
        pictures.draw(options.use, json.loads(kept.read_text(encoding="utf-8"))["runs"], picture)


if __name__ == "__main__":
    main()
