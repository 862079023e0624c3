"""The whole evaluation at a small size, and the step counterfactual against the exact derivative."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import measure_body
from stepinfluence import ExactCapture, Fisher, attach, influence
from stepinfluence.evaluation import Evaluation, Problem, evaluate, step_counterfactual, steps
from stepinfluence.evaluation.methods import METHODS
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.steps import StepRun


@pytest.fixture(scope="module")
def small() -> Problem:
    return make_problem("majority", n_train=48, n_query=8, updates=20)


def test_an_evaluation_end_to_end(small: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conserved = []

    def try_steps(problem: Problem, model: torch.nn.Module, **options: int) -> StepRun:
        found = steps.try_steps(problem, model, **options)
        check_conservation(found.conservation, problem, model)
        conserved.append(found.conservation)
        return found

    monkeypatch.setattr(sys.modules["stepinfluence.evaluation.evaluate"], "try_steps", try_steps)
    methods = {name: METHODS[name] for name in ("SDI, m=2048", "TracIn, exact", "random")}
    counts = {"seeds": 2, "subsets": 3, "left_out": 2}
    found = evaluate(small, methods, folder=tmp_path, progress=False, **counts)
    sdi, exact, chance = found.merits
    flips = 2 * (1 + 3 + 2) + 4  # four for the metasmoothness
    assert found.retrainings <= 2 * (flips + 3)  # two methods may remove the same examples: one model then
    assert found.retrainings >= 2 * flips + 1
    assert sdi.overlap is not None
    assert sdi.overlap.value > 0.8  # sketches pick what exact gradients pick
    assert exact.overlap is None
    np.testing.assert_allclose(sdi.lds.by_seed, exact.lds.by_seed, atol=0.3)
    assert chance.overlap is not None
    assert chance.overlap.value < 0.5
    assert sdi.mislabel is not None
    assert found.steps.conservation == max(conserved)
    assert len(conserved) == counts["seeds"]
    assert found.steps.counterfactual.value > 0.95
    assert found.steps.slope.value == pytest.approx(1, abs=0.2)
    assert found.steps.natural is not None
    assert found.steps.natural_slope is not None
    assert found.steps.natural.value > 0.9
    assert found.steps.natural_slope.value == pytest.approx(1, abs=0.2)
    assert "natural-gradient step at one loop step alone" in found.markdown()
    kept = found.to_dict()
    assert Evaluation.from_dict(kept).steps == found.steps
    del kept["steps"]["natural"]  # kept before it was tried
    assert Evaluation.from_dict(kept).steps.natural is None
    assert "| SDI, m=2048 |" in found.markdown()
    assert found.smoothness is not None
    assert found.smoothness.across_steps.value > 0.9
    assert "Metasmoothness" in found.markdown()

    retrain = Problem.retrain

    def untrainable(problem: Problem, rows: np.ndarray, seed: int) -> torch.nn.Module:
        assert len(rows) == len(small.train), "only the check of the folder trains again"
        return retrain(problem, rows, seed)

    monkeypatch.setattr(Problem, "retrain", untrainable)
    later = {"cosine": METHODS["grad-cosine"]}
    again = evaluate(small, later, folder=tmp_path, flips=0, progress=False, **counts)
    assert again.truth == found.truth
    assert again.steps == found.steps  # the models are the same to the bit


def check_conservation(found: float, problem: Problem, model: torch.nn.Module) -> None:
    """``found``: of all queries together."""
    capture = attach(model, body=model.core, sketch_size=2048)
    sketches = {target.name: target.sketch for target in capture.targets}
    batch = problem.collate(problem.queries)
    rounding = measure_body(model, [batch], problem.loss, model.core, list(sketches))
    rounding.check_conservation(found, sketches, lambda difference, size: difference.norm() / size.norm())


@pytest.mark.parametrize("natural", [False, True])
def test_step_counterfactual_is_the_derivative_by_step(small: Problem, natural: bool) -> None:
    """Along a gradient it is SDI, along a natural gradient SDI corrected by that Fisher."""
    model = small.retrain(np.arange(48), 0).double()
    train, query = small.collate(small.train[:6]), small.collate(small.queries)
    capture = ExactCapture(model, body=model.core)
    gradient = capture.featurize([train], small.loss, per_step=False, progress=False)
    fisher = Fisher.fit(gradient, damping=0.1)
    asked = capture.featurize([query], small.loss, progress=False)
    sdi = influence(gradient, asked, curvature=fisher if natural else "none").sdi[0]
    direction = (fisher.solve(gradient.values) if natural else gradient.values)[0]
    eta = 1e-6 / float(direction.norm())
    change = {b.name: (-eta * direction[b.start : b.stop]).view(b.shape) for b in gradient.space.blocks}
    before = [p.detach().clone() for p in model.parameters()]
    moved = step_counterfactual(model, model.core, query, small.loss, change, steps=4)
    torch.testing.assert_close(-moved / eta, sdi, rtol=1e-3, atol=1e-4 * float(sdi.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.core._forward_pre_hooks
    assert not model.core._forward_hooks


def test_step_counterfactual_refuses_what_it_cannot_do(small: Problem) -> None:
    model = small.untrained(0)
    query = small.collate(small.queries)
    change = {f"core.{name}": torch.zeros_like(p) for name, p in model.core.named_parameters()}
    with pytest.raises(ValueError, match="the body was entered 4 times"):
        step_counterfactual(model, "core", query, small.loss, change, steps=3)
    with pytest.raises(ValueError, match="change: lacks"):
        step_counterfactual(model, "core", query, small.loss, {}, steps=4)
    with pytest.raises(ValueError, match="body: got 2 modules"):
        step_counterfactual(model, [model.core.linear1, model.core.linear2], query, small.loss, change, steps=4)


def test_a_step_counterfactual_that_fails_leaves_the_weights(small: Problem) -> None:
    model = small.untrained(0)
    before = [p.detach().clone() for p in model.parameters()]
    change = {f"core.{name}": torch.ones_like(p) for name, p in model.core.named_parameters()}
    calls = []

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            model.core.linear2.register_forward_pre_hook(lambda *_: 1 / 0)
        return small.loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        step_counterfactual(model, "core", small.collate(small.queries), loss, change, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_logit_lens_is_the_loss_of_fewer_loops(small: Problem) -> None:
    model = small.retrain(np.arange(48), 0)
    batch = small.collate(small.queries)
    found = steps.logit_lens(model, "core", batch, small.loss)
    assert found.shape == (8, 4)
    for steps_run in range(1, 5):
        model.steps = steps_run
        with torch.no_grad():
            torch.testing.assert_close(found[:, steps_run - 1].float(), small.loss(model, batch))
    assert not model.core._forward_hooks
    with pytest.raises(ValueError, match="body: got 2 modules"):
        steps.logit_lens(model, [model.core.linear1, model.core.linear2], batch, small.loss)
