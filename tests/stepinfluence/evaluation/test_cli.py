"""``sdi evaluate``: what it prints, keeps, writes and refuses, on a problem that trains in no time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from additive import additive
from stepinfluence.app.cli import app, evaluate
from stepinfluence.evaluation import Estimate, problems
from stepinfluence.evaluation.methods import random_scores
from stepinfluence.evaluation.steps import StepRun
from typer.testing import CliRunner

QUICK = ["--seeds", "2", "--subsets", "3", "--left-out", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The trainings of the command."""
    fits: list[int] = []
    module = importlib.import_module("stepinfluence.evaluation.evaluate")
    steps = StepRun(0.0, Estimate(1, 1, 1), 1.0, Estimate(1, 1, 1), 1.0)
    monkeypatch.setattr(module, "try_steps", lambda *_, **__: steps)
    monkeypatch.setattr("stepinfluence.evaluation.problems.make_problem", lambda _: additive(fits=fits))
    monkeypatch.setattr(
        "stepinfluence.evaluation.methods.available", lambda: {"random": random_scores, "other": random_scores}
    )
    monkeypatch.chdir(tmp_path)
    return fits


def test_a_second_method_trains_only_what_it_removes(quick: list[int]) -> None:
    first = CliRunner().invoke(app, ["evaluate", "adder", "--method", "random", *QUICK])
    assert first.exit_code == 0, first.output
    assert "2 seeds, 26 models, kept in evaluate-adder" in " ".join(first.output.split())
    assert "Not distinguishable from chance" in first.output
    trained = len(quick)
    second = CliRunner().invoke(app, ["evaluate", "adder", "--method", "other", *QUICK])
    assert second.exit_code == 0, second.output
    assert len(quick) == trained + 1  # the check of the folder: chance is the same under another name


def test_json_and_file_say_the_same(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", "majority", "--json", "--out", "all.json", "--folder", "kept", *QUICK])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "all.json").read_text())
    assert found["settings"] == {"seeds": 2, "subsets": 3, "left_out": 2, "flips": 1, "repeats": 2}
    assert [m["method"] for m in found["merits"]] == ["random", "other"]
    assert len(found["merits"][0]["lds"]["by_seed"]) == len(found["merits"][0]["lds"]["within"]) == 2
    assert found["versions"]["torch"]
    assert (tmp_path / "kept" / "seed-1.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chess"], "problem: got 'chess'; use one of adder, majority, language, parity, trm"),
        (["adder", "--method", "Shapley"], "method: got 'Shapley'; use one of random, other"),
        (["adder", "--left-out", "21"], "left_out: got 21; additive has 20 training examples"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


def test_the_models_of_something_else_are_not_used(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["evaluate", "adder", "--method", "random", *QUICK]).exit_code == 0
    about = tmp_path / "evaluate-adder" / "about.json"
    about.write_text(about.read_text().replace("thread(s)", "threads of another machine"))
    done = CliRunner().invoke(app, ["evaluate", "adder", "--method", "random", *QUICK])
    assert done.exit_code == 2
    assert "folder: evaluate-adder holds models with torch" in " ".join(done.stderr.split())


def test_the_command_names_the_problems_that_there_are() -> None:
    assert tuple(problems.PROBLEMS) == evaluate.PROBLEMS
    assert all(f"[cyan]{name}[/cyan]" in evaluate.HELP for name in problems.PROBLEMS)
