"""bench.steps_removed: its statistic finds what is planted and nothing else; a stopped run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence.evaluation.metagradient import query_parts
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.training import Recipe, Training

from bench import steps_removed


def test_the_statistic_finds_steps_that_suffer_from_their_own_set() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 3, 4, 4))
    assert steps_removed.permutation_p(noise, draws=500) > 0.05
    planted = 1 + 0.1 * noise + np.eye(4)
    np.testing.assert_allclose(steps_removed.specificity(1 + np.eye(4)[None, None]), 0.8)
    assert steps_removed.specificity(planted).min() > 0.5
    assert steps_removed.permutation_p(planted, draws=500) < 0.01
    # A step that suffers from every set, and a set that all steps suffer from, are no finding.
    for common in (np.arange(1.0, 5.0), np.arange(1.0, 5.0)[:, None]):
        same = np.broadcast_to(common, (5, 3, 4, 4))
        assert steps_removed.permutation_p(same, draws=200) > 0.05


def test_p_values_of_nothing_are_uniform() -> None:
    rng = np.random.default_rng(1)
    found = [steps_removed.permutation_p(rng.normal(size=(4, 2, 4, 4)), draws=100, seed=k) for k in range(200)]
    assert 0.35 < np.mean(found) < 0.65
    assert 0.01 <= np.mean(np.array(found) < 0.1) <= 0.2


def test_a_run_and_what_is_kept_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(make_problem("majority", n_train=20, n_query=3, steps=2), training=Recipe(3, 3e-3))
    found = steps_removed.run(problem, 2, 2, "fisher", tmp_path)
    assert [len(found), len(found[0]["rows"])] == [2 * 2 * 2, 2]
    effects = steps_removed.by_seed(found, "lens")
    assert effects.shape == (2, 2, 2, 2)
    # The last step's lens is the loss.
    first, everyone, seed = found[0], np.arange(20), steps_removed.training_seed(0, 0)
    models = [problem.retrain(rows, seed) for rows in (everyone, np.delete(everyone, first["rows"]))]
    before, after = (problem.query_losses(model)[first["query"]] for model in models)
    assert first["lens"][-1] == pytest.approx(after - before, abs=1e-6)
    path = tmp_path / "removed-fisher.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    again = steps_removed.run(problem, 2, 2, "fisher", tmp_path)
    assert json.loads(path.read_text().splitlines()[-1]) == json.loads(lines[-1])
    assert again == found
    monkeypatch.setattr(steps_removed, "seeds_records", None)  # nothing is left to do
    assert steps_removed.run(problem, 2, 2, "fisher", tmp_path) == found
    assert 0 <= steps_removed.overlap(found) <= 1
    with pytest.raises(ValueError, match="is of another training of majority"):
        steps_removed.run(replace(problem, training=Recipe(4, 3e-3)), 2, 2, "fisher", tmp_path)


def test_what_is_left_out_by_metagradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose weight in the training moves a step's share of the query's loss most, by central differences; kept
    apart from what is left out by other scores."""
    problem = replace(
        make_problem("majority", n_train=20, n_query=3, steps=2), training=Recipe(3, 3e-3, root_epsilon=1e-8)
    )
    found = steps_removed.run(problem, 1, 1, "metagradient", tmp_path)
    training = Training(problem, steps_removed.training_seed(0, 0))
    starts = query_parts(training, training.final(), [found[0]["query"]])[0]
    h, moved = 1e-2, []
    for row in range(20):
        ends = [training.final(torch.ones(20) + sign * h * (torch.arange(20) == row)).parameters for sign in (1, -1)]
        moved.append(starts[:2].double() @ (ends[1] - ends[0]).double() / (2 * h))
    scores = torch.stack(moved)
    for record in found:
        mine = scores[:, record["step"]]
        least = mine.topk(2).values[-1] - 1e-2 * mine.abs().max()  # of float32, over a difference of 2 h
        assert bool((mine[record["rows"]] >= least).all())
        other = problem.retrain(np.delete(np.arange(20), record["rows"]), steps_removed.training_seed(0, 0))
        model = training.model_at(training.final())
        assert record["lens"][-1] == pytest.approx(
            float((problem.query_losses(other) - problem.query_losses(model))[record["query"]]), abs=1e-6
        )
    assert [path.name for path in tmp_path.iterdir()] == ["removed-metagradient.jsonl"]
    steps_removed.run(problem, 1, 1, "fisher", tmp_path)
    monkeypatch.setattr(steps_removed, "seeds_records", None)  # nothing is left to do
    assert steps_removed.run(problem, 1, 1, "metagradient", tmp_path) == found
