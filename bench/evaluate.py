"""Attribution methods against retraining, over seeds: the tables of docs/evaluation.md are made from what this keeps.

    python -m bench.evaluate adder          # or another of stepinfluence.evaluation.problems
    python docs/_site/evaluation.py

Every trained model is kept in ``--folder``: a stopped run goes on, and what is there is not trained again. The figures
are the library's (``sdi evaluate``); this adds dampings other than the chosen one, and where the figures come from.
TRAK and EK-FAC are among the methods where their packages are installed (``pip install traker kronfluence``: without
its ``fast`` extra TRAK projects with torch).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stepinfluence import attach
from stepinfluence.curvature import BlockFisher, Fisher
from stepinfluence.evaluation import evaluate, linear_datamodeling_score
from stepinfluence.evaluation.methods import METAGRADIENTS, available
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.retraining import Retrainings, draws

from bench.provenance import ROOT, Provenance

COUNTS = {
    "seeds": (5, "independent runs"),
    "subsets": (8, "halves of a seed"),
    "left_out": (6, "examples of a seed left out one at a time"),
    "flips": (1, "queries of a seed for the brittleness"),
    "repeats": (2, "initialisations of every retraining"),
}

GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Dampings that ``"auto"`` is held against."""

ELSEWHERE = (METAGRADIENTS, "grad-cosine")
"""Methods that are left out: the first takes minutes (``python -m bench.ladder``), the second is ``SDI, cosine`` without
sketches."""

ROUNDED = 3
"""Seeds that :func:`rounding` is measured on."""


def main() -> None:
    """Evaluate one problem and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=tuple(PROBLEMS))
    for name, (default, what) in COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--folder", type=Path, help="of trained models (evaluate-PROBLEM)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/evaluate-PROBLEM.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    counts = {name: getattr(args, name) for name in COUNTS}
    came_from = Provenance()
    folder = args.folder or Path(f"evaluate-{args.problem}")
    methods = {name: method for name, method in available().items() if name not in ELSEWHERE}
    found = evaluate(make_problem(args.problem), methods, folder=folder, **counts)
    dampings = by_damping(make_problem(args.problem), folder, found.seeds, counts["subsets"], counts["repeats"])
    rounded = rounding(make_problem(args.problem), folder, found.seeds[:ROUNDED])
    facts = came_from.finish()
    facts["versions"] |= {name: _version(name) for name in ("traker", "kronfluence", "tiny-recursive-model")}
    out = args.out or ROOT / "bench" / "results" / f"evaluate-{args.problem}.json"
    kept = {"settings": counts, **found.to_dict(), "dampings": dampings, "rounding": rounded, "provenance": facts}
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


def by_damping(
    problem: Problem, folder: Path, seeds: Sequence[int], subsets: int, repeats: int
) -> dict[str, list[float]]:
    """LDS for each seed of SDI (m = 2048) corrected with every damping of :data:`GRID`, by kind of matrix."""
    trained = Retrainings(problem, folder)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        drawn, model = draws(problem, seed, subsets=subsets, left_out=0), trained.model(seed)
        halves = [
            [trained.outcome(seed, np.flatnonzero(half), repeat=r, what="half").losses for half in drawn.halves]
            for r in range(repeats)
        ]
        capture = attach(model, body=problem.body(model), sketch_size=2048)
        train, query = (
            capture.featurize(problem.batches(side), problem.loss, per_step=False, progress=False)
            for side in ("train", "query")
        )
        for kind in (Fisher, BlockFisher):
            fitted = kind.fit(train, damping=GRID[0])
            for damping in GRID:
                scores = train.values @ fitted.with_damping(damping).transform(query).values.T
                lds = linear_datamodeling_score(scores.double().numpy(), np.mean(halves, axis=0), drawn.halves)
                found.setdefault(f"{kind.kind}, {damping:.0e}", []).append(float(np.nanmean(lds)))
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
