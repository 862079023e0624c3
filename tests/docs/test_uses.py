"""What docs/uses.md reads from its kept results holds for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepinfluence.evaluation import Estimate, over_seeds

ROOT = Path(__file__).resolve().parents[2]
USES = ("mislabelled", "curation", "horizon", "cancellation")


def kept(use: str) -> list[dict[str, Any]]:
    result = json.loads((ROOT / f"bench/results/uses-{use}.json").read_text(encoding="utf-8"))
    assert result["seeds"] == list(range(len(result["runs"])))
    return list(result["runs"])


def over(use: str, value: Callable[[dict[str, Any]], float]) -> Estimate:
    return over_seeds([value(run) for run in kept(use)])


@pytest.mark.parametrize("use", USES)
def test_eight_seeds_and_a_figure(use: str) -> None:
    assert len(kept(use)) == 8
    assert (ROOT / f"docs/images/uses-{use}.png").is_file()


def test_wrong_labels_are_found_about_as_well_by_the_loss() -> None:
    for problem in ("adder", "majority"):
        assert over("mislabelled", lambda run, p=problem: run[p]["self-influence"]["found"]).low > 2 / 16
    beyond = {
        (problem, score): over("mislabelled", lambda run, p=problem, s=score: run[p][s]["AUC"] - run[p]["loss"]["AUC"])
        for problem in ("adder", "majority")
        for score in ("self-influence", "leverage")
    }
    assert beyond["adder", "leverage"].low > 0
    assert beyond["adder", "leverage"].value < 0.05  # "a little"
    assert all(beyond["majority", score].low <= 0 for score in ("self-influence", "leverage"))
    for problem in ("adder", "majority"):
        for step in ("of the first step", "of the last step"):
            more = over(
                "mislabelled", lambda run, p=problem, s=step: run[p][s]["AUC"] - run[p]["self-influence"]["AUC"]
            )
            assert more.low <= 0


def test_normalised_scores_choose_best_and_depth_does_not_help() -> None:
    def more(name: str, than: str) -> Estimate:
        return over("curation", lambda run: run[name]["accuracy"] - run[than]["accuracy"])

    best = "all steps, normalised"
    assert more(best, "random").low > 0
    assert over("curation", lambda run: run[best]["of the kind"]).low > 0.9
    assert over("curation", lambda run: run["TracIn"]["wrong"]).value == pytest.approx(0.4, abs=0.05)
    assert more("TracIn", "random").value < 0 < more("TracIn", "random").high
    for how in (", normalised", ", corrected", ""):
        of_all = f"all steps{how}" if how else "TracIn"
        assert more(f"early steps{how}", of_all).low <= 0
        assert more(f"late steps{how}", of_all).low <= 0
    assert more("all steps, corrected", "random").low <= 0


def test_influence_of_these_models_never_fades() -> None:
    for run in kept("horizon"):
        for found in run.values():
            assert found["horizon"] == len(found["share"])
    for name in kept("horizon")[0]:
        mean = np.mean([run[name]["share"] for run in kept("horizon")], axis=0)
        assert mean.argmax() == 0
    worse = over(
        "horizon",
        lambda run: run["adder, trained with 4"]["accuracy"][11] - run["adder, trained with 4"]["accuracy"][3],
    )
    assert worse.value < -0.05 < 0 < worse.high  # on average, not beyond the spread


def test_cancellation_is_rare() -> None:
    assert over("cancellation", lambda run: run["adder"]["over half"]).high < 0.1
    assert over("cancellation", lambda run: run["majority"]["over half"]).high < 0.02
    for problem in ("adder", "majority"):
        assert over("cancellation", lambda run, p=problem: run[p]["median"]).high < 0.05
