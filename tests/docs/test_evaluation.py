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
