"""Which rewarded answers pushed the model where it is? A REINFORCE loss, one per sampled answer."""

from __future__ import annotations

import stepinfluence
import torch
from _tiny_lm import counting, make_model, train
from stepinfluence.attribution.losses import reward_weighted_loss, sequence_log_probs


def main() -> tuple[float, float]:
    model = train(make_model(), torch.cat([counting(16, 1, 1), counting(16, 2, 2)]), updates=30)
    answers = torch.cat([counting(10, 1, 5), counting(10, 2, 6)])
    rewards = torch.cat([torch.ones(10), -torch.ones(10)])  # counting by one is what is wanted

    def rewarded(model, batch):
        tokens, reward = batch
        return reward_weighted_loss(sequence_log_probs(model(tokens), tokens), reward)

    def likelihood(model, batch):
        return -sequence_log_probs(model(batch), batch)

    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train_features = capture.featurize([(answers, rewards)], rewarded, per_step=False, progress=False)
    query = capture.featurize([counting(6, 1, 9)], likelihood, progress=False)
    tracin = stepinfluence.influence(train_features, query).tracin.mean(1)
    good, bad = float(tracin[:10].mean()), float(tracin[10:].mean())
    print(f"rewarded answers that count by one, on new ones: {good:+.3g}")
    print(f"punished answers that count by two, on new ones: {bad:+.3g}")
    return good, bad


if __name__ == "__main__":
    main()
