"""How many loop steps does the model need at test time? Run it longer than trained, and see where influence sits.

Steps that hold no SDI energy (paper, D.3) are steps at which no training example has any say in the answer. The horizon
is how far back from the read-out the energy reaches; the accuracy with that many loops says whether they suffice.
"""

from __future__ import annotations

import numpy as np
import stepinfluence
from stepinfluence.evaluation.builtin import make_problem
from torch import nn

LOOPS = 10
LEAST_SHARE = 0.02


def main() -> int:
    problem = make_problem("adder")
    model = problem.fit(np.arange(len(problem.train)), 0)
    trained = model.steps
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    model.steps = LOOPS
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    energy = stepinfluence.influence(train, query).energy().sum(0)
    share = (energy / energy.sum()).tolist()
    first = next(t for t, v in enumerate(share) if v >= LEAST_SHARE)
    horizon = LOOPS - first
    print(f"trained with {trained} loops, asked with {LOOPS}; share of the energy by step:")
    print("  " + " ".join(f"{v:.2f}" for v in share))
    print(f"influence reaches {horizon} steps back (steps with at least {LEAST_SHARE:.0%})")
    for steps in range(1, LOOPS + 1):
        mark = "  <- horizon" if steps == horizon else "  <- as trained" if steps == trained else ""
        print(f"accuracy with {steps:2} loops: {accuracy(problem, model, steps):.2f}{mark}")
    return horizon


def accuracy(problem, model: nn.Module, steps: int) -> float:
    """Share of right answers when the loop is run ``steps`` times."""
    model.steps = steps
    return float(problem.query_correct(model).mean())


if __name__ == "__main__":
    main()
