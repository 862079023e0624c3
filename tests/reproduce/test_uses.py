"""The experiment ``uses``: what is planted, orders of a curriculum, verdicts, and a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepinfluence.evaluation import Estimate

from reproduce.base import Run
from reproduce.planted.config import make_task
from reproduce.planted.planting import clean
from reproduce.report import write_report
from reproduce.style import styled
from reproduce.uses import analyse, curriculum, late
from reproduce.uses import run as experiment
from reproduce.uses.config import CONFIGS

MINUTE = CONFIGS["minute"]
SORTING = make_task("sorting", large=False)


def test_late_ones_are_right_first_and_early_ones_in_the_end() -> None:
    examples, queries, kinds = late.planted(SORTING, MINUTE, 0)
    truth, middle = SORTING.states(examples.inputs), SORTING.steps // 2
    assert (SORTING.states(queries.inputs) == queries.states).all()
    for kind, right in (("", slice(None)), (late.LATE, slice(0, middle + 1)), (late.EARLY, slice(middle + 1, None))):
        rows = torch.tensor([k == kind for k in kinds])
        assert (examples.states[rows][:, right] == truth[rows][:, right]).all()
    rows = torch.tensor([k == late.LATE for k in kinds])
    assert (examples.states[rows][:, -1] != truth[rows][:, -1]).any(1).all()
    rows = torch.tensor([k == late.EARLY for k in kinds])
    assert (examples.states[rows] != truth[rows]).any(2).any(1).float().mean() > 0.9
    assert len({tuple(row) for row in torch.cat([examples.inputs, queries.inputs]).tolist()}) == len(kinds) + len(
        queries
    )


def test_scores_by_steps_add_up() -> None:
    values = np.arange(12.0).reshape(2, 6)
    found = late.by_steps(values)
    np.testing.assert_array_equal(found["early steps"] + found["late steps"], found["all steps"])
    np.testing.assert_array_equal(found["step 6"], values[:, 5])
    assert late.auc(np.array([3.0, 1, 2, 9]), np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)) == 1


def test_a_pool_grows_from_the_first_to_all() -> None:
    rank = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    assert curriculum.pool(8, 0.0, rank).tolist() == [3, 1]
    assert curriculum.pool(8, 0.25, rank).tolist() == [3, 1, 0, 2, 7]
    assert sorted(curriculum.pool(8, 0.5, rank).tolist()) == list(range(8))
    assert curriculum.pool(8, 0.0, None).tolist() == list(range(8))


def test_length_is_the_last_step_that_changes_something() -> None:
    inputs = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    assert curriculum.lengths(SORTING, clean(SORTING, inputs)).tolist() == [0, 1, 6]


@pytest.mark.parametrize(
    ("low", "high", "says"), [(0.1, 0.3, "yes"), (-0.3, -0.1, "no: the reverse"), (-0.1, 0.3, "not shown")]
)
def test_a_claim_holds_as_its_interval_says(low: float, high: float, says: str) -> None:
    assert analyse.holds(Estimate((low + high) / 2, low, high)).startswith(says)


def test_a_faster_order_is_called_faster() -> None:
    def stage(lower: float) -> dict[str, Any]:
        one = {"losses": [1.0, 1.0], "accuracy": 0.5}
        better = {"losses": [1.0 - lower, 1.0 - lower], "accuracy": 0.6}
        return {**dict.fromkeys(curriculum.ORDERS, one), "by profile": better, "agreement": 0.1}

    found = analyse.course_rows(analyse.course_numbers([stage(0.2), stage(0.21)]))
    [row] = [r for r in found if r.name.startswith("curriculum by profile:")]
    assert row.note.endswith("faster: yes")


@pytest.mark.slow
def test_a_run_is_reported(tmp_path: Path) -> None:
    task: Run[Any] = Run(tmp_path / "run", "uses", "minute", MINUTE)
    with styled():
        outcome = experiment.run(task)
    write_report(task, outcome, "python -m reproduce uses --scale minute --seed 0")
    assert len(list((task.folder / "figures").glob("*.png"))) == len(experiment.PARTS)
    results = json.loads((task.folder / "results.json").read_text())
    assert set(results["numbers"]) == set(experiment.PARTS)
    assert len(task.timings) == len(experiment.PARTS) * MINUTE.seeds
