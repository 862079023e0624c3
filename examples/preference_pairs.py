"""Which preference pairs taught the model its preference? DPO's loss, one per pair, both answers in one pass.

Half of the training pairs prefer counting by one to counting by two, a quarter by three to four, and a quarter prefer
the reverse of the first. Queries are new pairs of the first kind: the first should help them, the last should harm.
"""

from __future__ import annotations

import copy

import stepinfluence
import torch
from _tiny_lm import counting, make_model, train
from stepinfluence.attribution.losses import dpo_loss, interleave, sequence_log_probs


def pairs(n: int, better: int, worse: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return counting(n, better, seed), counting(n, worse, seed)


def main() -> dict[str, float]:
    mixed = torch.cat([counting(16, step, step) for step in (1, 2, 3, 4)])
    model = train(make_model(), mixed)
    reference = copy.deepcopy(model).requires_grad_(False)

    def loss_fn(model, batch):
        tokens = interleave(*batch)  # chosen and rejected in turn: (2 B, T)
        with torch.no_grad():
            base = sequence_log_probs(reference(tokens), tokens)
        return dpo_loss(sequence_log_probs(model(tokens), tokens), base)

    groups = {"same": pairs(12, 1, 2, 10), "other": pairs(6, 3, 4, 11), "reversed": pairs(6, 2, 1, 12)}
    batches = list(groups.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    features = capture.featurize(batches, loss_fn, per_step=False, progress=False)
    query = capture.featurize([pairs(5, 1, 2, 20)], loss_fn, progress=False)
    tracin = stepinfluence.influence(features, query).tracin.mean(1)
    means = {}
    for name, scores in zip(groups, tracin.split([len(b[0]) for b in batches]), strict=True):
        means[name] = float(scores.mean())
        print(f"mean influence of {name:<9} pairs on new pairs of the first kind: {means[name]:+.3g}")
    return means


if __name__ == "__main__":
    main()
