"""The page of the evaluation says what the kept results say, and its readings hold for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stepinfluence.evaluation import Evaluation, Figure
from stepinfluence.evaluation.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
KEPT = [problem for problem in PROBLEMS if (RESULTS / f"evaluate-{problem}.json").is_file()]
SDI, FISHER, LENGTH, TRAK = "SDI, m=2048", "SDI-Fisher, auto", "SDI-Fisher, training", "TRAK"
RUN, ADAM = "SOURCE of a run", "SOURCE, Adam's metric"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_page", ROOT / "docs/_site/evaluation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(kind: str, problem: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{kind}-{problem}.json").read_text("utf-8"))
    return data


def kept(problem: str) -> Evaluation:
    return Evaluation.from_dict(load("evaluate", problem))


def lost(problem: str, chosen: str) -> Figure:
    """LDS of a damping less that of the best of the grid."""
    lds = load("dampings", problem)["lds"]
    grid = [values for name, values in lds.items() if name.startswith("fisher, ") and name[-1].isdigit()]
    return Figure.of([a - b for a, b in zip(lds[chosen], max(grid, key=sum), strict=True)])


def test_the_blocks_are_made_from_the_kept_results(generator: ModuleType) -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert [m[2] for m in generator.BLOCK.finditer(written)] == KEPT
    assert generator.page(written) == written, "run: python docs/_site/evaluation.py"


@pytest.mark.parametrize("problem", KEPT)
def test_a_kept_result_has_five_seeds_and_says_where_it_is_from(problem: str) -> None:
    data = load("evaluate", problem)
    assert len(data["seeds"]) >= 5
    assert data["provenance"]["commit"]
    assert data["smoothness"]
    for merits in data["merits"]:
        assert len(merits["lds"]["by_seed"]) == len(data["seeds"])


def test_what_the_page_reads_of_majority_holds() -> None:
    found = kept("majority")
    by_name = {m.method: m for m in found.merits}
    assert found.smoothness is not None
    assert found.smoothness.nearby.low > 0.9
    for other in (SDI, "SDI, cosine", TRAK, "TRAK, 5 models"):
        assert found.difference("lds", FISHER, other).low > 0
    assert not found.difference("lds", FISHER, "EK-FAC").says_other_than(0)
    assert by_name[FISHER].seconds < by_name["EK-FAC"].seconds / 5
    smallest = "SDI-Fisher, auto, m=32"
    assert by_name[smallest].bytes_per_example < by_name[TRAK].bytes_per_example
    assert found.difference("lds", smallest, TRAK).low > 0
    for other in (FISHER, SDI, "SDI, cosine", TRAK, "TRAK, 5 models", "EK-FAC", "SDI-Fisher, training, 5 checkpoints"):
        assert found.difference("lds", LENGTH, other).low > 0
    assert found.difference("lds", RUN, LENGTH).low > 0
    assert max(found.merits, key=lambda m: m.lds.value).method == RUN
    assert not found.difference("lds", "SDI, m=256", SDI).says_other_than(0)
    assert not found.difference("lds", "TracIn, exact", SDI).says_other_than(0)
    assert by_name[SDI].randomization.low > 0.5 > by_name[FISHER].randomization.high
    turned = {m.method: m.brittleness.value for m in found.merits if m.brittleness is not None}
    assert all(turned[name] == 1 for name in (SDI, LENGTH, RUN, ADAM))
    assert all(turned[name] == 0 for name in (TRAK, "TRAK, 5 models", "random"))
    for name in (LENGTH, RUN, ADAM):
        assert found.difference("rise", name, FISHER).low > 0
        assert found.difference("rise", name, TRAK).low > 0
    assert found.steps.counterfactual.low > 0.9


def test_what_the_page_reads_of_trm_holds() -> None:
    found = kept("trm")
    assert found.difference("lds", FISHER, SDI).high < 0
    assert not found.difference("lds", FISHER, TRAK).says_other_than(0)
    for other in (FISHER, SDI, "SDI, cosine", TRAK, "TRAK, 5 models"):
        assert found.difference("lds", LENGTH, other).low > 0
    assert not found.difference("lds", LENGTH, RUN).says_other_than(0)
    assert found.difference("lds", ADAM, LENGTH).low > 0
    assert found.difference("lds", "SDI-Fisher, auto, m=32", TRAK).high < 0
    turned = {m.method: m.brittleness.value for m in found.merits if m.brittleness is not None}
    assert {name: share for name, share in turned.items() if share < 1} == {"random": 0.6}
    assert found.difference("rise", LENGTH, FISHER).low > 0
    assert not found.difference("rise", LENGTH, SDI).says_other_than(0)
    assert list(found.unable) == ["EK-FAC"]
    assert found.steps.counterfactual.high < 0.5


def test_what_the_pages_read_of_dampings_holds() -> None:
    auto = {problem: lost(problem, "fisher, auto").value for problem in ("adder", "majority", "language", "trm")}
    length = {problem: lost(problem, "fisher, training time").value for problem in auto}
    assert {problem for problem, value in auto.items() if value > -0.03} == {"language"}
    assert all(length[problem] > auto[problem] for problem in auto)
    assert min(length.values()) > -0.04
    assert length["adder"] > -0.03
    assert lost("majority", "fisher, training").value > -0.005 > lost("majority", "fisher, training time").value
    majority = {name: sum(values) / len(values) for name, values in load("dampings", "majority")["lds"].items()}
    assert majority["block, training"] < majority["block, auto"]
    assert majority["source of a run"] > max(value for name, value in majority.items() if name[-1].isdigit())
    assert [name for name, value in majority.items() if round(value, 2) == 0.90] == ["source of a run"]
    parity = load("dampings", "parity")["lds"]
    means = [sum(values) / len(values) for name, values in parity.items() if name[-1].isdigit()]
    assert min(means) > 0.035
    assert max(means) < 0.145
    for chosen in ("fisher, auto", "fisher, training time"):
        assert not lost("parity", chosen).says_other_than(0)


def test_what_the_page_reads_of_language_holds() -> None:
    found = kept("language")
    by_name = {m.method: m for m in found.merits}
    assert found.difference("lds", FISHER, SDI).low > 0
    assert not found.difference("lds", FISHER, TRAK).says_other_than(0)
    assert found.difference("lds", FISHER, "TRAK, 5 models").high < 0
    assert not found.difference("lds", FISHER, "EK-FAC").says_other_than(0)
    assert by_name[FISHER].seconds < by_name["EK-FAC"].seconds / 5
    assert found.difference("lds", "SDI-Fisher, auto, m=32", TRAK).high < 0
    for other in (SDI, "SDI, cosine"):
        assert found.difference("lds", LENGTH, other).low > 0
    for other in (FISHER, TRAK, "TRAK, 5 models", "EK-FAC", RUN):
        assert not found.difference("lds", LENGTH, other).says_other_than(0)
    for damping in ("auto", "training"):
        assert found.difference("lds", f"SDI-Fisher, {damping}, 5 checkpoints", RUN).low > 0
    assert not found.difference("lds", "SDI-Fisher, auto, 5 checkpoints", "TRAK, 5 models").says_other_than(0)
    assert max(found.merits, key=lambda m: m.lds.value).method == "TRAK, 5 models"
    assert by_name[LENGTH].seconds < by_name["EK-FAC"].seconds / 6
    assert found.difference("lds", "SDI-Fisher, auto, 5 checkpoints", FISHER).low > 0
    assert found.steps.counterfactual.low > 0.9


def test_what_the_page_reads_of_adder_holds() -> None:
    found = kept("adder")
    by_name = {m.method: m for m in found.merits}
    for other in (SDI, "SDI, cosine", TRAK, "EK-FAC"):
        assert found.difference("lds", FISHER, other).low > 0
    smallest = "SDI-Fisher, auto, m=32"
    for one, other in ((FISHER, "TRAK, 5 models"), (smallest, TRAK)):
        assert not found.difference("lds", one, other).says_other_than(0)
    assert by_name[smallest].bytes_per_example < by_name[TRAK].bytes_per_example
    assert by_name[FISHER].seconds < by_name["EK-FAC"].seconds / 5
    for other in (FISHER, SDI, "SDI, cosine", TRAK, "TRAK, 5 models", "EK-FAC"):
        assert found.difference("lds", LENGTH, other).low > 0
    assert not found.difference("lds", LENGTH, RUN).says_other_than(0)
    assert [m.method for m in found.merits if m.loo.low > 0] == ["SDI-Fisher, training, 5 checkpoints"]
    turned = {m.method: m.brittleness.value for m in found.merits if m.brittleness is not None}
    assert {name for name, share in turned.items() if share < 1} == {"random"}
    for other in (SDI, "SDI, cosine", "EK-FAC"):
        assert found.difference("rise", LENGTH, other).high < 0
    assert found.smoothness is not None
    assert found.smoothness.across_steps.low > 0.8
    assert found.smoothness.nearby.value > 0.5
    assert found.accuracy is not None
    assert found.accuracy.value > 0.75


def test_what_the_page_reads_of_parity_holds() -> None:
    found = kept("parity")
    assert found.smoothness is not None
    nearby = found.smoothness.nearby
    assert abs(nearby.value + 0.07) < 0.005
    below, above = sorted(nearby.by_seed)[:3], sorted(nearby.by_seed)[3:]
    assert max(below) < 0
    assert min(above) > 0.945
    assert abs(found.smoothness.across_steps.value - 0.37) < 0.005
    assert all(m.lds.value < 0.2 for m in found.merits)
    told = [m.method for m in found.merits if found.difference("lds", m.method, "random").says_other_than(0)]
    assert [name for name in told if name != "random"] == ["TRAK, 5 models"]
    assert found.accuracy is not None
    assert abs(found.accuracy.value - 0.83) < 0.005
    assert sorted(found.accuracy.by_seed)[0] < 0.6 < 0.7 < sorted(found.accuracy.by_seed)[1]
    turned = {m.method: m.brittleness.value for m in found.merits if m.brittleness is not None}
    assert turned["random"] == 0.4
    for name in ("SDI-Fisher, training, 5 checkpoints", ADAM, "EK-FAC", "TRAK, 5 models"):
        assert turned[name] == 1
    assert found.steps.counterfactual.low > 0.75
    assert not found.unable
