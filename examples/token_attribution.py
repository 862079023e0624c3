"""Which *tokens* of a training text mattered for an answer, and at which loop step?

A sequence becomes one example for each predicted token. Their influences add up to the sequence's.
"""

from __future__ import annotations

import stepinfluence
import torch
from _tiny_lm import counting, make_model, train
from stepinfluence.attribution.losses import loss_at, one_example_per_token, token_losses


def main() -> tuple[torch.Tensor, torch.Tensor]:
    texts = torch.cat([counting(16, 1, 1), counting(16, 3, 2)])
    model = train(make_model(), texts, updates=30)

    def whole(model, batch):
        return token_losses(model(batch), batch).sum(1)

    def by_token(model, batch):
        tokens, places = batch
        return loss_at(token_losses(model(tokens), tokens), places)

    capture = stepinfluence.attach(model, body=model.core, sketch_size=2048)
    query = capture.featurize([counting(1, 1, 9)], whole, progress=False)
    text = texts[0]
    tokens, places = one_example_per_token(text)
    each = capture.featurize([(tokens, places)], by_token, per_step=False, progress=False)
    sdi = stepinfluence.influence(each, query).sdi[:, 0]  # (tokens, steps)
    summed = stepinfluence.influence(capture.featurize([text[None]], whole, per_step=False, progress=False), query).sdi[
        0, 0
    ]
    print("text:", text.tolist())
    for place, trajectory in zip(places.tolist(), sdi.tolist(), strict=True):
        steps = " ".join(f"{v:+8.3g}" for v in trajectory)
        print(f"  token {place} ({int(text[place])}): {sum(trajectory):+8.3g}   by step {steps}")
    print(
        "  whole text:  ", f"{float(summed.sum()):+8.3g}", "  by step", " ".join(f"{v:+8.3g}" for v in summed.tolist())
    )
    return sdi, summed


if __name__ == "__main__":
    main()
