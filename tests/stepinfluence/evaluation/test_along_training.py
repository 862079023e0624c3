"""Methods along training: SOURCE under one metric of Adam's, and metagradients of some queries only."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence import Features, attach, influence
from stepinfluence.attribution.curvature import Segment, TrainingTime, Unrolled, segments_of, training_time
from stepinfluence.evaluation import along_training, evaluate
from stepinfluence.evaluation.metagradient import Metagradients, metagradients
from stepinfluence.evaluation.metrics import top_k_overlap
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.smoothness import Smooth
from stepinfluence.evaluation.trained import Trained
from stepinfluence.evaluation.training import Recipe

from bench import ladder

RECIPE = Recipe(6, 3e-3, warmup=2, decay=True, root_epsilon=1e-6)


@pytest.fixture(scope="module")
def trained() -> Trained:
    problem = replace(make_problem("majority", n_train=20, n_query=10, steps=2), training=RECIPE)
    return Trained(problem, problem.retrain(np.arange(20), 0), 0)


def test_source_is_that_of_the_library_summed_over_steps(trained: Trained) -> None:
    found = along_training.source(trained, segments=2, each=1, sketch_size=256)
    problem, training, metric = trained.problem, trained.training, along_training.mean_metric(trained)
    sides = []
    for update in (2, 4, 6):  # the middles of two halves (1.5 and 4.5, rounded to even), and the end
        model = training.model_at(trained.states[update])
        capture = attach(model, body=problem.body(model), sketch_size=256, preconditioner=metric)
        side = "query" if update == 6 else "train"
        sides.append(capture.featurize(problem.batches(side), problem.loss, progress=False))
    rates = [RECIPE.rate(k) for k in range(6)]
    segments = [Segment((0,), sum(rates[:3]) / 3, 3), Segment((1,), sum(rates[3:]) / 3, 3)]
    expected = influence(sides[:2], Unrolled.fit(sides[:2], segments).transform(sides[2])).tracin.double().numpy()
    np.testing.assert_allclose(found.scores, expected, atol=1e-4 * np.abs(expected).max())
    plain = along_training.source(trained, segments=2, each=1, sketch_size=256, adam=False)
    assert not np.allclose(plain.scores, found.scores, atol=1e-2 * np.abs(expected).max())


def test_source_of_a_run_is_what_its_files_would_give(trained: Trained, tmp_path: Path) -> None:
    """The states as checkpoints of Adam, read back by the library."""
    problem, training, paths = trained.problem, trained.training, []
    trains: list[Features] = []
    for update in (2, 4, 6):
        state, model = trained.states[update], training.model_at(trained.states[update])
        squares = training.by_name(state.square)
        optimizer = {
            "state": {k: {"exp_avg_sq": v, "step": float(update)} for k, v in enumerate(squares.values())},
            "param_groups": [
                {
                    "params": list(range(len(squares))),
                    "param_names": list(squares),
                    "lr": RECIPE.rate(update - 1),
                    "initial_lr": RECIPE.learning_rate,
                    "betas": RECIPE.betas,
                    "eps": 0.0,
                    "amsgrad": False,
                }
            ],
        }
        paths.append(tmp_path / f"step-{update}.pt")
        torch.save({"model": model.state_dict(), "optimizer": optimizer}, paths[-1])
        capture = attach(model, body=problem.body(model), sketch_size=256)
        trains.append(capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False))
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    told = along_training.progress_of(trained, (2, 4, 6))
    # The recipe's root epsilon of 1e-6 is added inside Adam's root: it shows in entries with small gradients only.
    times = training_time(paths, capture).times
    assert TrainingTime.of(told).times == pytest.approx(times, rel=0.2)
    asked = Unrolled.fit(trains, segments_of(told)).transform(query)
    expected = influence(trains, asked).tracin.double().numpy()
    found = along_training.source_of_run(trained, count=3, sketch_size=256)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4 * np.abs(expected).max())


def test_the_metric_is_adams_over_training(trained: Trained) -> None:
    squares, rates = np.zeros(len(trained.states[0].square)), 0.0
    for k, state in enumerate(trained.states[1:]):
        corrected = state.square.double().numpy() / (1 - 0.999 ** (k + 1))
        squares += RECIPE.rate(k) / np.sqrt(corrected + 1e-6)
        rates += RECIPE.rate(k)
    metric = along_training.mean_metric(trained)
    found = torch.cat([metric[name].sqrt.flatten() for name in trained.training.names])
    np.testing.assert_allclose(found.numpy(), np.sqrt(squares / rates), rtol=1e-5)


def test_metagradients_of_the_first_queries(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found = along_training.exact_metagradients(trained)
    expected = metagradients(trained.training, range(8)).total
    np.testing.assert_allclose(found.scores[:, :8], expected, atol=1e-5 * float(expected.abs().max()))
    assert np.isnan(found.scores[:, 8:]).all()
    fresh = replace(trained, model=trained.problem.untrained(1), seed=1, untrained=True)
    assert np.isnan(along_training.exact_metagradients(fresh).scores).all()
    monkeypatch.setattr(along_training, "smoothness", lambda *_, **__: Smooth(0.2, 0.1))
    with pytest.warns(UserWarning, match=r"majority: metasmoothness 0.20, below 0.5"):
        along_training.exact_metagradients(trained)


def test_figures_of_a_method_that_scores_some_queries(trained: Trained) -> None:
    """They are over those queries, and no figure is made up for others."""
    scores = np.random.default_rng(0).normal(size=(20, 10))
    some = scores.copy()
    some[:, 8:] = np.nan
    overlap = top_k_overlap(some, scores, 3)
    assert (overlap[:8] == 1).all()
    assert np.isnan(overlap[8:]).all()

    def method(scores: np.ndarray) -> along_training.Scored:
        return along_training.Scored(scores, None, 0.0, 0)

    methods = {"TracIn, exact": lambda _: method(scores), "some": lambda _: method(some)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(trained.problem, methods, seeds=2, subsets=3, left_out=2, repeats=1, progress=False)
    whole, part = found.merits
    for name in ("lds", "loo"):
        assert not np.isnan(part.figure(name).by_seed).any()  # type: ignore[union-attr]
        assert part.figure(name).by_seed != whole.figure(name).by_seed  # type: ignore[union-attr]
    assert part.overlap is not None
    assert part.overlap.value == 1


def test_the_ladder_asks_all_the_same(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(_: Trained) -> along_training.Scored:
        return along_training.Scored(np.ones((20, 10)), None, 0.0, 0)

    masked = ladder.of_the_same_queries(everything)(trained).scores
    assert np.isnan(masked).any(0).tolist() == [False] * 8 + [True] * 2
    # Held against SDI by step in place of metagradients, the second step's turned around, and queries in this order.
    body, problem = trained.model.core, trained.problem
    capture = attach(trained.model, body=body, sketch_size=2048)
    train, query = (capture.featurize(problem.batches(s), problem.loss, progress=False) for s in ("train", "query"))
    sdi = influence(train.summed(), query).sdi[:, [3, 1]]
    parts = torch.stack([sdi[..., 0], -sdi[..., 1], torch.zeros(20, 2)], 2)
    exact = Metagradients(parts, (3, 1), per_step=True, per_update=False)
    monkeypatch.setattr(ladder, "metagradients", lambda *_: exact)
    found = ladder.by_step(trained, [3, 1])
    by_step = ["SDI, m=2048", "SDI-Fisher, auto", "SDI-Fisher, training", "SOURCE of a run", "SOURCE, Adam's metric"]
    assert list(found) == by_step
    own = np.array(found["SDI, m=2048"])
    np.testing.assert_allclose(np.diag(own), [1, -1], atol=0.01)
    assert max(np.abs(np.array(one)).max() for one in found.values()) <= 1


def test_the_ladder_leaves_out_steps_that_no_gradient_reaches(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
    parts[:, 1, 0] = 0  # of one query
    exact = Metagradients(parts, (3, 1), per_step=True, per_update=False)
    monkeypatch.setattr(ladder, "metagradients", lambda *_: exact)
    assert {np.shape(one) for one in ladder.by_step(trained, [3, 1]).values()} == {(1, 1)}
