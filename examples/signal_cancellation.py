"""Which pairs look unrelated because their loop steps cancel? Large step terms, near-zero sum: invisible to TracIn."""

from __future__ import annotations

import stepinfluence
import torch
from stepinfluence.evaluation.builtin import make_problem


def main() -> torch.Tensor:
    problem = make_problem("adder")
    model = problem.fit(range(len(problem.train)), 0)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=2048)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    sdi = stepinfluence.influence(train, query).sdi
    size, total = sdi.abs().sum(2), sdi.sum(2).abs()
    cancelled = 1 - total / size.clamp_min(torch.finfo(size.dtype).tiny)
    loud = size > size.quantile(0.9)  # only pairs that act on one another at all
    ranked = torch.where(loud, cancelled, -1).flatten().argsort(descending=True)[:5]
    print("pairs whose steps cancel the most, among the tenth with the largest step terms:")
    for place in ranked.tolist():
        row, column = divmod(place, sdi.shape[1])
        steps = " ".join(f"{v:+.3g}" for v in sdi[row, column].tolist())
        print(f"  train {row}, query {column}: {cancelled[row, column]:.0%} cancelled; by step {steps}")
    return cancelled.flatten()[ranked]


if __name__ == "__main__":
    main()
