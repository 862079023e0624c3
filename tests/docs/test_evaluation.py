"""The page of the evaluation says what the kept results say, and its readings hold for them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from stepinfluence.evaluation import Evaluation

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = ("adder", "majority")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_page", ROOT / "docs/_site/evaluation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(problem: str) -> Evaluation:
    return Evaluation.from_dict(json.loads((ROOT / f"bench/results/evaluate-{problem}.json").read_text("utf-8")))


def test_the_blocks_are_made_from_the_kept_results(generator: ModuleType) -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert [m[2] for m in generator.BLOCK.finditer(written)] == list(PROBLEMS)
    assert generator.page(written) == written, "run: python docs/_site/evaluation.py"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_kept_result_has_five_seeds_and_says_where_it_is_from(problem: str) -> None:
    data = json.loads((ROOT / f"bench/results/evaluate-{problem}.json").read_text("utf-8"))
    assert len(data["seeds"]) >= 5
    assert data["provenance"]["commit"]
    for merits in data["merits"]:
        assert len(merits["lds"]["by_seed"]) == len(data["seeds"])


def test_what_the_page_reads_from_them_holds() -> None:
    adder, majority = (kept(problem) for problem in PROBLEMS)
    sdi, exact = "SDI, m=2048", "TracIn, exact"
    for found in (adder, majority):
        by_name = {m.method: m for m in found.merits}
        for sketched in (sdi, "SDI, m=256"):
            assert not found.difference("lds", sketched, exact).says_other_than(0)
            overlap = by_name[sketched].overlap
            assert overlap is not None
            assert overlap.low > 0.85  # "nearly the same"
        assert found.steps.counterfactual.low > 0.9
        assert abs(found.steps.slope.value - 1) < 0.05
        assert by_name[sdi].randomization.low > 0.3
        learnt = {name: m.randomization.value for name, m in by_name.items() if name != "random"}
        assert min(learnt, key=lambda name: learnt[name]) == "TRAK"
        assert found.difference("lds", "TRAK", sdi).low > 0
        assert not by_name["random"].loo.says_other_than(0)
    assert not adder.difference("lds", "grad-cosine", sdi).says_other_than(0)
    assert majority.difference("lds", "grad-cosine", sdi).high < 0
    loo = {m.method: m.loo for m in adder.merits}
    assert not any(loo[name].says_other_than(0) for name in (sdi, "SDI, m=256", exact, "grad-cosine"))
    assert 0 < loo["TRAK"].low < 0.05  # "just above"
    turned = {m.method: m.brittleness for m in adder.merits}
    assert all(turned[name].value == 0 for name in (sdi, exact))  # type: ignore[union-attr]
    assert all(turned[name].value > 0.5 for name in ("grad-cosine", "TRAK"))  # type: ignore[union-attr]
    assert adder.truth is not None
    assert adder.truth.loo_agreement is not None
    assert not adder.truth.loo_agreement.low > 0
    assert adder.truth.noise.value > adder.truth.loo_change.value
    loo = {m.method: m.loo for m in majority.merits if m.method != "random"}
    assert all(figure.low > 0 for figure in loo.values())
    assert max(loo, key=lambda name: loo[name].value) == "TRAK"
    assert not {m.method: m.lds for m in majority.merits}["grad-cosine"].says_other_than(0)
    assert majority.truth is not None
    assert majority.truth.loo_agreement is not None
    assert majority.truth.loo_agreement.low > 0.5
    assert all(m.brittleness is not None and m.brittleness.value == 0 for m in majority.merits)
