"""``sdi query`` says how far its ranking can be trusted, and what the model answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stepinfluence.app.cli import app
from stepinfluence.search import ask, top_k
from stepinfluence.search.noise import halves, standard_errors
from stepinfluence.store import Store
from token_project import write_checkpoints, write_project
from typer.testing import CliRunner


def invoke(*arguments: str | Path) -> str:
    env = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner().invoke(app, [str(a) for a in arguments], env=env)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    project = write_project(folder / "words.py")
    pattern = write_checkpoints(project, folder)
    splits = ("--split", "train", "--split", "query", "--checkpoints", pattern)
    invoke("featurize", "--project", project, *splits, "--sketch-size", "32", "--out", folder / "run")
    return folder / "run"


def test_scores_have_errors_and_rankings_a_verdict(run: Path) -> None:
    [sdi] = json.loads(invoke("query", run, "--row", "2", "-k", "4", "--curvature", "none", "--json"))
    train, query = Store.open(run / "train"), Store.open(run / "query")
    features = [query.features(k, [2]) for k in (0, 1)]
    rows = torch.tensor([[hit["row"] for hit in sdi["hits"]]])
    errors = standard_errors(ask(train, features), rows)[0][0].tolist()
    assert [hit["standard_error"] for hit in sdi["hits"]] == pytest.approx(errors)
    mean_square = sum(e * e for e in errors) / 4
    assert sdi["agreement"]["standard_error"] == pytest.approx(mean_square**0.5)
    half = halves(ask(train, features), 4, rows).rows
    assert sdi["agreement"]["lead_by_halves"] == [len({*rows[0].tolist()} & {*h[0].tolist()}) for h in half]
    assert sdi["agreement"]["unknown"] is None
    shown = invoke("query", run, "--row", "2", "-k", "4", "--curvature", "none")
    assert "Sketch noise: a score is off by ± " in shown
    assert "lead by either half of the columns, too." in shown


def test_corrected_scores_have_the_noise_of_two_halves(run: Path) -> None:
    [both] = json.loads(invoke("query", run, "--row", "2", "-k", "4", "--json"))
    assert both["score"].startswith("influence corrected")
    assert both["agreement"]["standard_error"] > 0
    assert len(both["agreement"]["lead_by_halves"]) == 2
    assert "standard_error" not in both["hits"][0]
    assert "standard_error" in both["also"][0]["hits"][0]


def test_exact_answers_say_how_many_led_before(run: Path) -> None:
    arguments = ("query", run, "--row", "2", "-k", "3", "--curvature", "none", "--json")
    [exact], [plain] = (json.loads(invoke(*arguments, *more)) for more in (("--exact",), ()))
    led = {hit["row"] for hit in plain["hits"]} & {hit["row"] for hit in exact["hits"]}
    assert exact["agreement"]["lead_exactly"] == len(led)
    assert f"{len(led)} of these 3 are also the first 3 by the sketches." in invoke(*arguments[:-1], "--exact")
    store = Store.open(run / "train")
    features = [Store.open(run / "query").features(k, [2]) for k in (0, 1)]
    assert [h["row"] for h in plain["hits"]] == top_k(store, features, 3, progress=False).rows[0].tolist()


def test_the_answer_stands_beside_the_truth(run: Path, tmp_path: Path) -> None:
    shown = invoke("query", run, "--row", "2", "-k", "1")
    [told] = json.loads(invoke("query", run, "--row", "2", "-k", "1", "--json"))
    answer, truth = told["query"]["answer"], told["query"]["truth"]
    assert f"The model answers {answer}; the truth is {truth}  {'✓ right' if answer == truth else '✗ wrong'}" in shown
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"id": "new", "tokens": [0, 1, 3, 7]}) + "\n")
    [told] = json.loads(invoke("query", run, "--input", new, "-k", "1", "--json"))
    assert told["query"]["truth"] == "."
    assert told["query"]["answer"]
