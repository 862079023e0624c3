"""Which labels should a human look at first? Rank by self-influence; planted errors come to the top."""

from __future__ import annotations

import numpy as np
import stepinfluence
from stepinfluence.evaluation import Recipe, mislabel_auc
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.search.unusual import outliers

RECIPE = Recipe(updates=100, learning_rate=3e-3)
"""Plain Adam, a full batch in each update."""


def measure(problem_name: str, seed: int) -> dict[str, dict[str, float]]:
    """By score: AUC of the planted errors, and the share of them among as many first suspects."""
    problem = make_problem(problem_name, seed=seed, n_train=192, recipe=RECIPE)
    model = problem.retrain(np.arange(len(problem.train)), seed)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, progress=False)
    by_step = stepinfluence.self_influence(train).numpy()  # (N, steps)
    leverage = np.empty(len(train))
    for outlier in outliers(train, len(train), by="leverage", damping=1e-3):
        leverage[outlier.row] = outlier.score
    scores = {
        "self-influence": by_step.sum(1),
        "of the first step": by_step[:, 0],
        "of the last step": by_step[:, -1],
        "leverage": leverage,
        "loss": train.losses.numpy(),
    }
    wrong = problem.mislabelled
    return {
        name: {
            "AUC": mislabel_auc(score, wrong).value,
            "found": float(wrong[np.argsort(-score, kind="stable")[: wrong.sum()]].mean()),
        }
        for name, score in scores.items()
    }


def main() -> float:
    found = measure("adder", 0)
    print("one label in sixteen is wrong; looking at as many suspects as there are errors:")
    for name, figures in found.items():
        print(f"{name:<18} finds {figures['found']:.0%}; AUC {figures['AUC']:.2f}")
    return found["self-influence"]["AUC"]


if __name__ == "__main__":
    main()
