"""How many loop steps does the model need? Run it longer than trained, and see where influence sits.

Steps that hold no SDI energy (paper, D.3) are steps at which no training example has any say in the answer. The horizon
is how far back from the read-out the energy reaches; the accuracy with that many loops says whether they suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import stepinfluence
from stepinfluence.evaluation import Recipe
from stepinfluence.evaluation.problems import make_problem

RECIPE = Recipe(updates=100, learning_rate=3e-3)
"""Plain Adam, a full batch in each update."""
LOOPS = 12
LEAST_SHARE = 0.02


def measure(problem_name: str, trained: int, seed: int) -> dict[str, Any]:
    """The horizon, the share of the energy by step when asked with ``LOOPS``, and the accuracy of every loop count."""
    problem = make_problem(problem_name, steps=trained, seed=seed, n_train=192, recipe=RECIPE)
    model = problem.retrain(np.arange(len(problem.train)), seed)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    model.steps = LOOPS
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    energy = stepinfluence.influence(train, query).energy().sum(0)
    share = (energy / energy.sum()).tolist()
    accuracy = []
    for model.steps in range(1, LOOPS + 1):
        accuracy.append(float(problem.query_correct(model).mean()))
    first = next(t for t, v in enumerate(share) if v >= LEAST_SHARE)
    return {"horizon": LOOPS - first, "share": share, "accuracy": accuracy}


def main() -> int:
    trained = 4
    found = measure("adder", trained, 0)
    print(f"trained with {trained} loops, asked with {LOOPS}; share of the energy by step:")
    print("  " + " ".join(f"{v:.2f}" for v in found["share"]))
    print(f"influence reaches {found['horizon']} steps back (steps with at least {LEAST_SHARE:.0%})")
    for steps, accuracy in enumerate(found["accuracy"], start=1):
        marks = {trained: "  <- as trained", found["horizon"]: "  <- horizon"}
        print(f"accuracy with {steps:2} loops: {accuracy:.2f}{marks.get(steps, '')}")
    return int(found["horizon"])


if __name__ == "__main__":
    main()
