"""Attribution methods against retraining, over seeds: the tables of docs/evaluation.md are made from what this keeps.

    python -m bench.evaluate adder          # or another of stepinfluence.evaluation.problems
    python docs/_site/evaluation.py

Every trained model is kept in ``--folder``: a stopped run goes on, and what is there is not trained again. The figures
are the library's (``sdi evaluate``); this adds where they come from. TRAK and EK-FAC are among the methods where their
packages are installed (``pip install traker kronfluence``: without its ``fast`` extra TRAK projects with torch).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stepinfluence.evaluation import evaluate
from stepinfluence.evaluation.methods import METAGRADIENTS, available
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.retraining import Retrainings

from bench.provenance import ROOT, Provenance

COUNTS = {
    "seeds": (5, "independent runs"),
    "subsets": (8, "halves of a seed"),
    "left_out": (6, "examples of a seed left out one at a time"),
    "flips": (1, "queries of a seed for the brittleness"),
    "repeats": (2, "initialisations of every retraining"),
}

ELSEWHERE = (METAGRADIENTS, "grad-cosine")
"""Methods that are left out: the first takes minutes (``bench.ladder``), the second is ``SDI, cosine`` without
sketches."""

ROUNDED = 3
"""Seeds that :func:`rounding` is measured on."""


def main() -> None:
    """Evaluate one problem and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=tuple(PROBLEMS))
    for name, (default, what) in COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--without", action="append", default=[], metavar="METHOD", help="leave it out; repeat for several"
    )
    parser.add_argument("--folder", type=Path, help="of trained models (evaluate-PROBLEM)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/evaluate-PROBLEM.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    counts = {name: getattr(args, name) for name in COUNTS}
    came_from = Provenance()
    folder = args.folder or Path(f"evaluate-{args.problem}")
    methods = {name: method for name, method in available().items() if name not in (*ELSEWHERE, *args.without)}
    found = evaluate(make_problem(args.problem), methods, folder=folder, **counts)
    rounded = rounding(make_problem(args.problem), folder, found.seeds[:ROUNDED])
    facts = came_from.finish()
    facts["versions"] |= {name: _version(name) for name in ("traker", "kronfluence", "tiny-recursive-model")}
    out = args.out or ROOT / "bench" / "results" / f"evaluate-{args.problem}.json"
    kept = {"settings": counts, **found.to_dict(), "rounding": rounded, "provenance": facts}
    out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    print(found.markdown())


def rounding(problem: Problem, folder: Path, seeds: Sequence[int]) -> list[float]:
    """Mean absolute difference of a query's loss, for each seed, when a full batch is in another order.

    The training is the same but for the order of sums: this is what another CPU, which rounds differently, does to it.
    """
    trained = Retrainings(problem, folder)
    turned = trained.everyone[::-1].copy()
    pairs = [[trained.outcome(s, rows, what="all").losses for rows in (trained.everyone, turned)] for s in seeds]
    return [float(np.abs(a - b).mean()) for a, b in pairs]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
