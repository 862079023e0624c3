"""This project."""

from __future__ import annotations

import stepinfluence
from torch import Tensor

from bench.peers.ask import Ask, Matrix
from bench.peers.model import Looped, example_losses

DISTRIBUTION = "sdi-kernels"
SKETCH_SIZE = 2048


def _influence(
    capture: stepinfluence.Capture | stepinfluence.ExactCapture, train: Tensor, query: Tensor
) -> stepinfluence.Influence:
    left = capture.featurize([train], example_losses, per_step=False, progress=False)
    return stepinfluence.influence(left, capture.featurize([query], example_losses, progress=False))


def _sketched(model: Looped, train: Tensor, query: Tensor) -> stepinfluence.Influence:
    return _influence(stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE), train, query)


def _exact(model: Looped, train: Tensor, query: Tensor) -> stepinfluence.Influence:
    return _influence(stepinfluence.ExactCapture(model, body=model.core), train, query)


def scores(model: Looped, train: Tensor, query: Tensor) -> Matrix:
    return _sketched(model, train, query).tracin.double().numpy()


ASKS = [
    Ask(
        "sketched",
        f"`attach(model, body=model.core, sketch_size={SKETCH_SIZE})`, `influence(train, query)`",
        scores,
        projection=SKETCH_SIZE,
        by_step=lambda *a: _sketched(*a).sdi.double().numpy(),
        note="its seconds include `verify`, one more pass over the first batch",
    ),
    Ask(
        "exact",
        "`ExactCapture(model, body=model.core)`, `influence(train, query)`",
        lambda *a: _exact(*a).tracin.double().numpy(),
        by_step=lambda *a: _exact(*a).sdi.double().numpy(),
    ),
]
