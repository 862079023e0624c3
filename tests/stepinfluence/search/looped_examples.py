"""A small looped model, examples one by one, and a two-stage search over them."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from stepinfluence import Capture, ExactCapture, Features, attach, influence
from stepinfluence.search import Recompute, TwoStage, ask, two_stage
from torch import Tensor

N, Q = 40, 3


class Examples:
    """Examples of ``zoo.make_batch`` one by one."""

    def __init__(self, size: int, seed: int) -> None:
        self.batch = zoo.make_batch(size, seed=seed, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.batch["x"])

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        return {name: t[index] for name, t in self.batch.items()}


def setting(seed: int = 0, sketch_size: int = 8) -> tuple[Capture, Examples, Examples, Tensor]:
    """A capture with sketches that are far too small, and the exact influence, in float64."""
    torch.manual_seed(seed)
    model = zoo.Looped(zoo.LAYERS["mlp"]()).double().eval()
    train, query = Examples(N, 1), Examples(Q, 2)
    exact = ExactCapture(model, body="core")
    full = influence(
        exact.featurize([train.batch], zoo.squared_error, per_step=False),
        exact.featurize([query.batch], zoo.squared_error),
    ).sdi
    return attach(model, body="core", sketch_size=sketch_size), train, query, full


def featurized(capture: Capture, data: Examples, *, per_step: bool) -> Features:
    return capture.featurize([data.batch], zoo.squared_error, per_step=per_step)


QUESTION = ("per_step", "harmful", "steps", "curvature", "damping")


def search(capture: Capture, train: Examples, query: Examples, k: int, **options: Any) -> TwoStage:
    rows = options.pop("features", None) or featurized(capture, train, per_step=False)
    question = {name: options.pop(name) for name in QUESTION if name in options}
    stages = {name: options.pop(name) for name in ("candidates", "index") if name in options}
    asked = ask(rows, featurized(capture, query, per_step=options.pop("query_steps", True)), **question)
    return two_stage(asked, k, exact=Recompute(capture, zoo.squared_error, train, query, **options), **stages)
