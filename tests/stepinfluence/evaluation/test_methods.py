"""The compared methods are the library's scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stepinfluence import attach, influence
from stepinfluence.attribution.curvature import TrainingTime
from stepinfluence.evaluation import along_training
from stepinfluence.evaluation.methods import METHODS
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.evaluation.trained import Trained
from stepinfluence.evaluation.training import CannotScore, checkpoint_updates


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


@pytest.fixture(scope="module")
def trained() -> Trained:
    problem = make_problem("majority", n_train=40, n_query=6, updates=10)
    return Trained(problem, problem.retrain(np.arange(40), 0), 0)


def test_the_damping_of_trainings_length_is_read_from_the_checkpoints_of_a_run(trained: Trained) -> None:
    problem, times = trained.problem, along_training.times_of_run(trained).times
    assert times == TrainingTime.of(along_training.progress_of(trained, checkpoint_updates(10, 5))).times
    each, scores = [], 0.0
    for checkpoint, time in zip(trained.checkpoints(5), times, strict=True):
        capture = attach(checkpoint.model, body=problem.body(checkpoint.model), sketch_size=2048)
        sides = [capture.featurize(problem.batches(side), problem.loss, progress=False) for side in ("train", "query")]
        one = influence(*sides, curvature="fisher", damping=TrainingTime(time)).tracin.double().numpy()
        each.append(one)
        scores = scores + checkpoint.learning_rate * checkpoint.updates * one
    for name, want in (("SDI-Fisher, training", each[-1]), ("SDI-Fisher, training, 5 checkpoints", scores)):
        found = METHODS[name](trained)
        np.testing.assert_allclose(found.scores, want, atol=1e-4 * np.abs(want).max())
        assert found.suspicion is not None
    assert not np.allclose(each[-1], METHODS["SDI-Fisher, auto"](trained).scores, atol=0.01 * np.abs(each[-1]).max())


def test_a_training_that_does_not_tell_its_length_is_no_wrong_number(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> list[Any]:
        return []

    monkeypatch.setattr(along_training, "progress_of", nothing)
    for name in ("SDI-Fisher, training", "SDI-Fisher, training, 5 checkpoints"):
        with pytest.raises(CannotScore, match="majority: progress: got no checkpoint"):
            METHODS[name](trained)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_tells_its_length(name: str) -> None:
    if name == "trm":
        pytest.importorskip("tiny_recursive_model")
    problem = make_problem(name, updates=10)
    times = along_training.times_of_run(Trained(problem, problem.retrain(np.arange(len(problem.train)), 0), 0)).times
    assert 0 < times[0] < times[-1]
