"""Figures over seeds: intervals, averages over repeats, and sentences, on a problem whose truth is known."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from additive import EFFECTS, additive
from stepinfluence.evaluation import Estimate, Evaluation, Figure, Problem, agreement, bootstrap, evaluate, over_seeds
from stepinfluence.evaluation.methods import METHODS, Method, random_scores
from stepinfluence.evaluation.metrics import share_over_seeds
from stepinfluence.evaluation.steps import StepRun
from stepinfluence.evaluation.trained import Scored, Trained
from stepinfluence.evaluation.training import CannotScore
from torch import nn

MODULE = importlib.import_module("stepinfluence.evaluation.evaluate")


def test_interval_over_seeds_by_hand() -> None:
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    reach = 2.776445 * np.sqrt(2.5 / 5)  # Student's quantile at 4 degrees of freedom, from the tables
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - reach, 3 + reach), abs=1e-5)
    assert over_seeds([1.0, np.nan, 3.0]).value == 2
    assert over_seeds([1.0]).value == 1
    assert np.isnan(over_seeds([1.0]).low)
    assert np.isnan(over_seeds([]).value)


def test_interval_over_five_seeds_covers_as_it_says_and_a_bootstrap_does_not() -> None:
    """Of 400 samples about 380 (standard deviation 4.4) have their mean inside; a bootstrap of five misses more."""
    samples = np.random.default_rng(0).normal(size=(400, 5))
    found = [over_seeds(s) for s in samples]
    assert 366 <= sum(e.low <= 0 <= e.high for e in found) <= 394
    narrow = [bootstrap(s, draws=200) for s in samples]
    assert sum(e.low <= 0 <= e.high for e in narrow) < 350


def test_interval_of_a_share_by_hand() -> None:
    none, most = share_over_seeds([0.0] * 5), share_over_seeds([1, 1, 0, 1, 1])
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 5)))  # (1 - p)^5 = 2.5 %
    assert (most.value, most.low, most.high) == pytest.approx((0.8, 0.2836, 0.9949), abs=1e-4)  # from the tables
    assert share_over_seeds([1.0, np.nan]).high == 1
    assert share_over_seeds([0.5, 0.5]).low > 0
    assert np.isnan(share_over_seeds([np.nan]).value)


def test_agreement_of_repeats() -> None:
    once = np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    same, opposed = agreement([once, 10 * once])[0], agreement([once, -once])[0]
    assert (same, opposed) == (1, -1)
    assert np.isnan(agreement([once, once])[1])  # nothing varies
    noise = np.random.default_rng(0).normal(size=(3, 40, 50))
    assert abs(agreement(noise).mean()) < 0.1
    with pytest.raises(ValueError, match="outcomes: got shape"):
        agreement(once)


def no_steps(*_: object, **__: object) -> StepRun:
    return StepRun(0.0, Estimate(1, 1, 1), 1.0, Estimate(1, 1, 1), 1.0)


def figure(*values: float) -> Figure:
    return Figure.of([Estimate(v, v - 0.1, v + 0.1) for v in values])


def test_a_figure_tells_what_it_knows() -> None:
    assert str(figure(0.1, 0.2, 0.3)) == "0.20 [-0.05, 0.45]"
    assert str(figure(0.5, 0.5)) == "0.50 (every seed)"
    assert str(figure(0.5)) == "0.50"
    assert not figure(0.1, 0.2, 0.3).says_other_than(0)
    assert figure(0.2, 0.21, 0.22).says_other_than(0)
    assert not figure(0.5).says_other_than(0)  # one seed says nothing of others
    assert figure(0.1, 0.3).within[1] == Estimate(0.3, 0.3 - 0.1, 0.3 + 0.1)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    """The effects themselves as scores, their negative, and chance."""

    def scores(sign: int) -> Method:
        def method(trained: Trained) -> Scored:
            return Scored(sign * EFFECTS, None, 0.5, 8)

        return method

    methods = {"right": scores(1), "wrong": scores(-1), "random": random_scores}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "try_steps", no_steps)
        return evaluate(additive(3.0), methods, seeds=range(10, 15), subsets=12, left_out=8, progress=False)


def test_scores_that_are_the_truth_are_perfect_in_every_seed(found: Evaluation) -> None:
    right, wrong, chance = found.merits
    assert found.seeds == (10, 11, 12, 13, 14)
    np.testing.assert_allclose(right.lds.by_seed, 1)
    np.testing.assert_allclose(right.loo.by_seed, 1)
    np.testing.assert_allclose(wrong.lds.by_seed, -1)
    np.testing.assert_allclose(wrong.loo.by_seed, -1)
    assert max(np.abs(chance.lds.by_seed)) < 0.6
    assert len(set(chance.lds.by_seed)) == 5  # drawn anew in every seed


def test_the_noise_of_the_truth_is_measured(found: Evaluation) -> None:
    assert found.truth is not None
    np.testing.assert_allclose(found.truth.loo_agreement.by_seed, 1)  # exact within an initialisation
    np.testing.assert_allclose(found.truth.half_agreement.by_seed, 1)
    # Mean absolute difference of two normal levels of standard deviation 3: 3 * 2 / sqrt(pi); 20 draws.
    assert found.truth.noise.value == pytest.approx(6 / np.sqrt(np.pi), rel=0.5)
    assert found.truth.loo_change.value == pytest.approx(np.abs(EFFECTS).mean(), rel=0.3)


def test_without_repeats_seeds_are_held_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "try_steps", no_steps)
    counts = {"subsets": 3, "left_out": 2, "flips": 0, "repeats": 1}
    found = evaluate(additive(3.0), {"random": random_scores}, seeds=8, progress=False, **counts)
    assert found.truth is not None
    assert found.truth.noise.value == pytest.approx(6 / np.sqrt(np.pi), rel=0.5)
    assert found.truth.loo_agreement is None
    assert "it is not known how far two initialisations agree" in found.markdown()
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))).markdown() == found.markdown()
    alone = evaluate(additive(3.0), {"random": random_scores}, seeds=1, progress=False, **counts)
    assert alone.truth is None
    assert alone.merits[0].brittleness is None


def chaotic(effect: float) -> Problem:
    """Every training ends elsewhere, by 3; the examples' effects are scaled by ``effect``."""

    def fit(rows: np.ndarray, seed: int) -> nn.Module:
        model = additive().untrained(0)
        noise = 3 * np.random.default_rng([seed, *rows.tolist()]).normal(size=4)
        model.load_state_dict({"losses": torch.from_numpy(noise - effect * EFFECTS[rows].sum(0))})
        return model

    return replace(additive(), fit=fit)


def test_averaging_over_repeats_takes_noise_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "try_steps", no_steps)
    right = {"right": lambda trained: Scored(EFFECTS, None, 0.0, 0)}
    counts = {"seeds": 1, "subsets": 10, "left_out": 10, "flips": 0}
    one = evaluate(chaotic(1.0), right, repeats=1, progress=False, **counts).merits[0]
    many = evaluate(chaotic(1.0), right, repeats=24, progress=False, **counts).merits[0]
    assert many.loo.value > 0.6 > one.loo.value + 0.3
    assert many.lds.value > 0.9 > one.lds.value + 0.2


def test_truth_that_is_noise_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "try_steps", no_steps)

    noisy = chaotic(0.0)
    found = evaluate(noisy, {"random": random_scores}, seeds=5, subsets=6, left_out=6, flips=0, progress=False)
    assert found.truth is not None
    assert not found.truth.loo_agreement.low > 0
    assert "not distinguishable from 0, so one run's effects are noise" in found.markdown()


def test_sentences_name_what_is_chance(found: Evaluation) -> None:
    said = found.chance()
    assert "LDS (0) of `random`" in said
    assert "`right`" not in said
    assert "`wrong`" not in said  # worse than chance is not chance
    gap = found.difference("lds", "right", "wrong")
    np.testing.assert_allclose(gap.by_seed, 2)
    with pytest.raises(ValueError, match="'right' has no mislabel"):
        found.difference("mislabel", "right", "wrong")
    with pytest.raises(ValueError, match="figure: got 'seconds'"):
        found.difference("seconds", "right", "wrong")


def test_nothing_turned_in_five_seeds_is_no_certainty(found: Evaluation) -> None:
    assert "| 0.00 [0.00, 0.52] (0 of 5) |" in found.markdown()


def test_the_most_helpful_fifth_is_left_out_for_the_queries_nearest_to_the_border() -> None:
    right = {"right": lambda trained: Scored(EFFECTS, None, 0.0, 0)}
    effects = np.sort(EFFECTS, axis=0)[::-1][:4].sum(0)  # what leaving out the best 4 of 20 adds to each loss
    first = -EFFECTS.sum(0)
    order = np.argsort(-first)  # all are right: the greatest loss is nearest to the border
    border = first[order[0]] + effects[order[0]] / 2  # between that query's loss before and after
    problem = replace(additive(0.0), correct=lambda model, batch: model.losses[batch] < border)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "try_steps", no_steps)
        counts = {"seeds": 2, "subsets": 3, "left_out": 2, "repeats": 1}
        one = evaluate(problem, right, flips=1, progress=False, **counts)
        two = evaluate(problem, right, flips=2, progress=False, **counts).merits[0]
        unsaid = evaluate(replace(problem, correct=None), right, flips=4, progress=False, **counts).merits[0]
    assert one.merits[0].brittleness is not None
    assert one.merits[0].brittleness.value == 1
    assert one.merits[0].rise is not None
    np.testing.assert_allclose(one.merits[0].rise.by_seed, effects[order[0]])
    assert two.rise is not None
    np.testing.assert_allclose(two.rise.by_seed, effects[order[:2]].mean())
    assert unsaid.brittleness is None  # there is no border; all queries are asked
    assert unsaid.rise is not None
    np.testing.assert_allclose(unsaid.rise.by_seed, effects.mean())
    kept = one.to_dict()
    assert Evaluation.from_dict(json.loads(json.dumps(kept))) == one
    del kept["merits"][0]["rise"]  # kept before it was asked
    assert Evaluation.from_dict(kept).merits[0].rise is None


def test_a_result_survives_json(found: Evaluation) -> None:
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)).markdown() == found.markdown()


def test_one_model_serves_all_methods(tmp_path: Path) -> None:
    fits: list[int] = []
    problem = additive(fits=fits)
    one = {"a": lambda trained: Scored(EFFECTS, None, 0.0, 0)}
    two = {**one, "b": lambda trained: Scored(EFFECTS, None, 0.0, 0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "try_steps", no_steps)
        first = evaluate(problem, one, seeds=2, subsets=3, left_out=2, folder=tmp_path, progress=False)
        assert len(fits) == first.retrainings == 2 * (2 * (1 + 3 + 2) + 1)
        evaluate(problem, two, seeds=2, subsets=3, left_out=2, folder=tmp_path, progress=False)
    assert len(fits) == first.retrainings + 1  # the check of the folder; what "b" removes is what "a" does


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seeds": 0}, "seeds: got 0"),
        ({"seeds": (1, 1)}, "each once"),
        ({"subsets": 2}, "subsets, left_out, repeats: got 2, 6, 2"),
        ({"repeats": 0}, "at least 3, 2 and 1"),
    ],
)
def test_counts_that_say_nothing_are_refused(wrong: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(additive(), {"random": random_scores}, progress=False, **wrong)  # type: ignore[arg-type]


def test_a_method_that_cannot_be_run_is_named() -> None:
    def unable(trained: Trained) -> Scored:
        raise CannotScore("needs another model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "try_steps", no_steps)
        methods = {"unable": unable, "random": random_scores, "over": METHODS["SDI, 5 checkpoints"]}
        found = evaluate(additive(), methods, seeds=2, subsets=3, left_out=2, progress=False)
    assert [m.method for m in found.merits] == ["random"]
    assert "Could not be run: unable (needs another model)." in found.markdown()
    assert "over (additive: has no recipe" in found.markdown()
    assert found.smoothness is None
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))).unable == found.unable
