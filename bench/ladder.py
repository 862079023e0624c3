"""From one step of training to all of them: how well each rung of the ladder predicts retraining, on the same queries.

    python -m bench.ladder majority --keep

Plain gradients, gradients over checkpoints, the Fisher at the end (with either damping), SOURCE by segments, and exact
metagradients, update by update. The last take minutes for a model, so all methods are asked the same eight queries.
Halves are trained from the initialisation of the model that is scored, as metagradients are of that training: what
another initialisation does is no business of theirs. For a few queries metagradients are taken by loop step, too, and
held against the scores by step of the others: does a method's score of step t follow the exact one of step t, and more
than that of another step?

Models that ``python -m bench.evaluate`` has trained are not trained again: give its
``--folder``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats
from stepinfluence import attach, influence
from stepinfluence.attribution.curvature import TrainingTime
from stepinfluence.evaluation import evaluate
from stepinfluence.evaluation.along_training import ASKED, times_of_run, unrolled, unrolled_by_run
from stepinfluence.evaluation.metagradient import metagradients
from stepinfluence.evaluation.methods import METAGRADIENTS, Method, available
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.retraining import Retrainings, training_seed
from stepinfluence.evaluation.trained import Scored, Trained

from bench.of_problem import begun, parser_of
from bench.provenance import write

RUNGS = (
    "SDI, m=2048",
    "SDI, 5 checkpoints",
    "SDI-Fisher, auto",
    "SDI-Fisher, training",
    "SDI-Fisher, auto, 5 checkpoints",
    "SDI-Fisher, training, 5 checkpoints",
    "SOURCE of a run",
    "SOURCE, Adam's metric",
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


def by_step(trained: Trained, asked: Sequence[int]) -> dict[str, list[list[float]]]:
    """For each method ``(steps, steps)``: rank correlation over train examples of its score at one step with the exact
    metagradient at another, mean over queries. Steps that no gradient reaches, as in training with a truncated backward
    pass, are left out: there is nothing to correlate with."""
    problem, model = trained.problem, trained.model
    exact = metagradients(trained.training, asked).by_step.double().numpy()
    capture = attach(model, body=problem.body(model), sketch_size=2048)
    train = problem.features(capture, "train")
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    length = TrainingTime(times_of_run(trained).times[-1])
    found = {
        "SDI, m=2048": influence(train, query),
        "SDI-Fisher, auto": influence(train, query, curvature="fisher"),
        "SDI-Fisher, training": influence(train, query, curvature="fisher", damping=length),
        "SOURCE of a run": influence(*unrolled_by_run(trained)),
        "SOURCE, Adam's metric": influence(*unrolled(trained)),
    }
    steps = [t for t in range(exact.shape[2]) if np.ptp(exact[:, :, t], axis=0).all()]
    return {
        name: [
            [
                float(np.mean([stats.spearmanr(one.sdi[:, q, s], exact[:, k, t])[0] for k, q in enumerate(asked)]))
                for t in steps
            ]
            for s in steps
        ]
        for name, one in found.items()
    }


def main() -> None:
    parser = parser_of(__doc__, PROBLEMS, folder="evaluate")
    parser.add_argument("--subsets", type=int, default=12, help="halves of a seed")
    parser.add_argument("--by-step", type=int, default=2, help="queries of a seed that are asked by loop step")
    options, provenance = begun(parser, lambda known: f"ladder-{known.problem}", "evaluate")
    problem = make_problem(options.problem)
    known = available()
    found = evaluate(
        problem,
        {name: of_the_same_queries(known[name]) for name in RUNGS if name in known},
        seeds=options.seeds,
        subsets=options.subsets,
        left_out=2,
        flips=0,
        repeats=1,
        folder=options.folder,
    )
    print(found.markdown())
    agreement = []
    for seed in found.seeds:
        model = Retrainings(problem, options.folder).model(seed)
        trained = Trained(problem, model, training_seed(seed, 0))
        agreement.append(by_step(trained, range(options.by_step)))
        print(f"seed {seed}: {json.dumps(agreement[-1])}", flush=True)
    settings = {"seeds": options.seeds, "subsets": options.subsets, "queries": ASKED, "by_step": options.by_step}
    write(options.json, provenance, {"settings": settings, **found.to_dict(), "agreement": agreement})


if __name__ == "__main__":
    main()
