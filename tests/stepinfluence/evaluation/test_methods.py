"""The compared methods are the library's scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stepinfluence import attach, influence
from stepinfluence.evaluation.methods import METHODS
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.trained import Trained


@pytest.mark.parametrize(
    ("name", "size", "how"),
    [
        ("SDI-Fisher, auto", 2048, {"curvature": "fisher"}),
        ("SDI-Fisher, auto, m=256", 256, {"curvature": "fisher"}),
        ("SDI-Fisher blocks, auto", 2048, {"curvature": "block"}),
        ("SDI-Fisher of unit rows, 1e-2", 2048, {"curvature": "fisher", "damping": 1e-2, "normalize": "train"}),
        ("SDI, cosine", 2048, {"normalize": "both"}),
    ],
)
def test_corrected_scores_are_those_of_influence(name: str, size: int, how: dict[str, Any]) -> None:
    problem = make_problem("majority", n_train=40, n_query=6, updates=3)
    model = problem.retrain(np.arange(40), 0)
    found = METHODS[name](Trained(problem, model, 0))
    capture = attach(model, body=problem.body(model), sketch_size=size)
    sides = [capture.featurize(problem.batches(side), problem.loss, progress=False) for side in ("train", "query")]
    want = influence(*sides, **how).tracin.double().numpy()
    # Steps were summed before the product there and after it here: float32 sums in another order.
    np.testing.assert_allclose(found.scores, want, atol=1e-4 * np.abs(want).max())
    assert (found.suspicion is None) == ("normalize" in how)
