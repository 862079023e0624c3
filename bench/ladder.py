"""From one step of training to all of them: how well each rung of the ladder predicts retraining, on the same queries.

    python -m bench.ladder majority --keep

Plain gradients, gradients over checkpoints, the Fisher at the end, SOURCE by segments, and exact metagradients, update
by update. The last take minutes for a model, so all methods are asked the same eight queries. Halves are trained from
the initialisation of the model that is scored, as metagradients are of that training: what another initialisation does
is no business of theirs. Models that ``python -m bench.evaluate`` has trained are not trained again: give its
``--folder``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from stepinfluence.evaluation import evaluate
from stepinfluence.evaluation.along_training import ASKED
from stepinfluence.evaluation.methods import METAGRADIENTS, Method, available
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.trained import Scored, Trained

from bench.provenance import Provenance, add_output, write

RUNGS = (
    "SDI, m=2048",
    "SDI, 5 checkpoints",
    "SDI-Fisher, auto",
    "SDI-Fisher, auto, 5 checkpoints",
    "SOURCE",
    METAGRADIENTS,
    "TRAK",
    "EK-FAC",
    "random",
)


def of_the_same_queries(method: Method) -> Method:
    """The method, without scores of the queries that metagradients are not asked."""

    def asked(trained: Trained) -> Scored:
        found = method(trained)
        scores = found.scores.copy()
        scores[:, ASKED:] = np.nan
        return replace(found, scores=scores)

    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--subsets", type=int, default=12, help="halves of a seed")
    parser.add_argument("--folder", type=Path, help="of trained models (evaluate-PROBLEM)")
    known, _ = parser.parse_known_args()
    add_output(parser, f"ladder-{known.problem}")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    provenance, problem = Provenance(), make_problem(options.problem)
    known = available(problem)
    found = evaluate(
        problem,
        {name: of_the_same_queries(known[name]) for name in RUNGS if name in known},
        seeds=options.seeds,
        subsets=options.subsets,
        left_out=2,
        flips=0,
        repeats=1,
        folder=options.folder or Path(f"evaluate-{options.problem}"),
    )
    print(found.markdown())
    settings = {"seeds": options.seeds, "subsets": options.subsets, "queries": ASKED}
    write(options.json, provenance, {"settings": settings, **json.loads(json.dumps(found.to_dict()))})


if __name__ == "__main__":
    main()
