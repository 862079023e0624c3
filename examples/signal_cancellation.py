"""Which pairs look unrelated because their loop steps cancel? Large step terms, near-zero sum: invisible to TracIn."""

from __future__ import annotations

from typing import Any

import numpy as np
import stepinfluence
import torch
from stepinfluence.evaluation import Recipe
from stepinfluence.evaluation.problems import make_problem

RECIPE = Recipe(updates=100, learning_rate=3e-3)
"""Plain Adam, a full batch in each update."""
LOUD = 0.9
"""Quantile of the size of the step terms: only pairs that act on one another at all."""


def cancelled(sdi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``1 - |sum of steps| / sum of |steps|``, and which pairs are loud, both ``(N, Q)``."""
    size, total = sdi.abs().sum(2), sdi.sum(2).abs()
    return 1 - total / size.clamp_min(torch.finfo(size.dtype).tiny), size > size.quantile(LOUD)


def scores(problem_name: str, seed: int, *, exact: bool) -> torch.Tensor:
    """``(N, Q, steps)``, sketched or exact."""
    problem = make_problem(problem_name, seed=seed, n_train=192, recipe=RECIPE)
    model = problem.retrain(np.arange(len(problem.train)), seed)
    if exact:
        capture = stepinfluence.ExactCapture(model, body=model.core)
    else:
        capture = stepinfluence.attach(model, body=model.core, sketch_size=2048)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    return stepinfluence.influence(train, query).sdi


def measure(problem_name: str, seed: int) -> dict[str, Any]:
    """How much is cancelled among loud pairs; of those that are over a half, how many exact gradients confirm."""
    found, loud = cancelled(scores(problem_name, seed, exact=False))
    true, _ = cancelled(scores(problem_name, seed, exact=True))
    half = loud & (found > 0.5)
    return {
        "median": float(found[loud].median()),
        "over half": float((found[loud] > 0.5).float().mean()),
        "over 90 %": float((found[loud] > 0.9).float().mean()),
        "confirmed": float((true[half] > 0.5).float().mean()) if half.any() else None,
        "histogram": torch.histc(found[loud], 20, 0, 1).div(int(loud.sum())).tolist(),
    }


def main() -> torch.Tensor:
    sdi = scores("adder", 0, exact=False)
    found, loud = cancelled(sdi)
    ranked = torch.where(loud, found, -1).flatten().argsort(descending=True)[:5]
    print("pairs whose steps cancel the most, among the tenth with the largest step terms:")
    for place in ranked.tolist():
        row, column = divmod(place, sdi.shape[1])
        steps = " ".join(f"{v:+.3g}" for v in sdi[row, column].tolist())
        print(f"  train {row}, query {column}: {found[row, column]:.0%} cancelled; by step {steps}")
    return found.flatten()[ranked]


if __name__ == "__main__":
    main()
