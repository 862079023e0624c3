"""Which labels should a human look at first? Rank by self-influence; planted errors come to the top."""

from __future__ import annotations

import numpy as np
import stepinfluence
from stepinfluence.evaluation import mislabel_auc
from stepinfluence.evaluation.builtin import make_problem


def main() -> float:
    problem = make_problem("adder")
    model = problem.fit(np.arange(len(problem.train)), 0)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, progress=False)
    by_step = stepinfluence.self_influence(train)  # (N, steps)
    suspicion = by_step.sum(1).numpy()
    wrong = problem.mislabelled
    order = np.argsort(-suspicion)
    print(f"{wrong.sum()} of {len(wrong)} labels are wrong")
    for looked in (12, 24, 48):
        print(f"looking at the first {looked}: {wrong[order[:looked]].sum()} of them found")
    auc = mislabel_auc(suspicion, wrong)
    print(f"AUC {auc}")
    share = by_step / by_step.sum(1, keepdim=True)
    print("share by step, wrong labels:", [f"{v:.2f}" for v in share[wrong].mean(0).tolist()])
    print("share by step, right labels:", [f"{v:.2f}" for v in share[~wrong].mean(0).tolist()])
    return auc.value


if __name__ == "__main__":
    main()
