"""How many loop steps does the model need? Steps that carry no influence energy can be left out at test time.

The horizon is the first step by which the queries' SDI energy is used up (paper, D.3): beyond it no training example
matters. It is compared with what leaving the later steps out does to the accuracy.
"""

from __future__ import annotations

import stepinfluence
import torch
from stepinfluence.evaluation.builtin import make_problem
from torch import nn

LEAST_SHARE = 0.05


def main() -> int:
    problem = make_problem("adder")
    model = problem.fit(range(len(problem.train)), 0)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    energy = stepinfluence.influence(train, query).energy().sum(0)
    share = energy / energy.sum()
    # A loop reads its answer after the last step, so the *first* steps are the ones that can be spared.
    needed = int((share >= LEAST_SHARE).sum())
    print("share of the energy by step:", " ".join(f"{v:.2f}" for v in share.tolist()))
    print(f"steps with at least {LEAST_SHARE:.0%} of the energy: {needed} of {model.steps}")
    for steps in range(1, model.steps + 1):
        print(f"accuracy with {steps} steps: {accuracy(problem, model, steps):.2f}")
    return needed


def accuracy(problem, model: nn.Module, steps: int) -> float:
    """Share of right answers when the loop is run ``steps`` times."""
    trained, model.steps = model.steps, steps
    try:
        return float(problem.query_correct(model).mean())
    finally:
        model.steps = trained


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
