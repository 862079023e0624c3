"""Tokens and answers are kept with a run, and tokens' influences add up to their example's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import content
from stepinfluence import Project, ProjectError, StoreError
from stepinfluence.app.runs import Prepared, RunConfig, SplitConfig, run_splits
from stepinfluence.app.runs.answers import Answered, answers_path, read_answers
from stepinfluence.app.runs.by_token import token_features
from stepinfluence.app.runs.stored import StoredRun
from token_project import write_checkpoints, write_project


def featurize(project: Path, out: Path, *splits: str, checkpoints: str | None = None, fold: bool = False) -> StoredRun:
    settings = dict.fromkeys(splits or ("train", "query"), SplitConfig(batch_size=4, shard_rows=4, threads=1))
    given = () if checkpoints is None else (checkpoints,)
    config = RunConfig(project, settings, given, sketch_size=16, fold=fold)
    list(run_splits(Prepared(Project.load(project), config, torch.device("cpu")), out, progress=False))
    return StoredRun.open(out)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "words.py")


def test_tokens_are_kept_with_the_rows(project: Path, tmp_path: Path) -> None:
    train = featurize(project, tmp_path / "run").store("train")
    data, loaded = Project.load(project).dataset("train"), Project.load(project)
    assert [train.row(row).tokens for row in range(12)] == [tuple(loaded.tokens(e) or ()) for e in data]
    before = content(tmp_path / "run")
    (tmp_path / "run" / "train" / "c000" / "shard-00000001.json").unlink()
    featurize(project, tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_other_tokens_are_noticed(project: Path, tmp_path: Path) -> None:
    featurize(project, tmp_path / "run", "train")
    (tmp_path / "run" / "train" / "c000" / "shard-00000001.json").unlink()
    write_project(project, ('"dog", "sat"', '"fox", "sat"'))
    with pytest.raises(StoreError, match=r"text, metadata or tokens of row \d+ \(id 'train-\d+'\)"):
        featurize(project, tmp_path / "run", "train")


def test_more_tokens_than_are_kept_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepinfluence.app.project.MOST_TOKENS", 3)
    loaded = Project.load(project)
    with pytest.raises(ProjectError, match=r"tokens\(\) returned 4 tokens of \d+ characters; at most 3 of"):
        loaded.tokens(loaded.dataset("train")[0])


def test_answers_and_truths_are_those_of_the_last_checkpoint(project: Path, tmp_path: Path) -> None:
    pattern = write_checkpoints(project, tmp_path)
    run = featurize(project, tmp_path / "run", checkpoints=pattern)
    loaded, query = Project.load(project), run.store("query")
    model = loaded.model()
    model.load_state_dict(torch.load(tmp_path / "step-2.pt", weights_only=True)["model"])
    data = loaded.dataset("query")
    want = {
        row: Answered((loaded.answers(model, loaded.collate([data[row]]), 1) or [""])[0], loaded.truth(data[row]))
        for row in range(len(data))
    }
    assert read_answers(query) == want
    assert {one.right for one in want.values()} <= {True, False}
    assert read_answers(run.store("train")) == {}
    # Killed before they were written: the next call does.
    answers_path(query.path).unlink()
    featurize(project, tmp_path / "run", checkpoints=pattern)
    assert read_answers(query) == want


def test_damaged_answers_are_refused(project: Path, tmp_path: Path) -> None:
    query = featurize(project, tmp_path / "run").store("query")
    path = answers_path(query.path)
    path.write_text(path.read_text().replace('"answers"', '"answer"'))
    with pytest.raises(StoreError, match=r"answers\.json"):
        read_answers(query)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return [WORDS[token] for token in guess.tolist()]", "return guess", "answer() returned Tensor"),
        ("for token in guess.tolist()]", "for token in guess.tolist()[1:]]", r"answer() returned 3 for 4 examples"),
        ('return WORDS[example["tokens"][-1]]', "return 7", "truth() returned int"),
    ],
)
def test_answers_of_a_wrong_kind_are_refused(project: Path, tmp_path: Path, old: str, new: str, says: str) -> None:
    write_project(project, (old, new))
    with pytest.raises(ProjectError) as caught:
        featurize(project, tmp_path / "run", "query")
    assert says in str(caught.value)


@pytest.mark.numeric
@pytest.mark.parametrize("fold", [False, True])
def test_tokens_influences_add_up_to_their_examples(project: Path, tmp_path: Path, fold: bool) -> None:
    write_project(project, ("return Looped()", "return Looped().double()"))
    run = featurize(project, tmp_path / "run", checkpoints=write_checkpoints(project, tmp_path), fold=fold)
    train, query = run.store("train"), run.store("query")
    asked = [query.features(k, [2]) for k in range(len(query.checkpoints))]
    for found in token_features(run, train, [3, 5]):
        sdi = found.influence(asked, etas=[c.eta for c in train.checkpoints])
        assert found.tokens == train.row(found.row).tokens
        assert sdi.shape == (1, len(found.tokens), 3)
        assert not sdi[:, 0].any()  # nothing predicts the first token
        whole = run.new_features([run.examples(train)[found.row]], per_step=False)
        want = sum(
            c.eta * part.values[0].double() @ q.values[0].double().T
            for c, part, q in zip(train.checkpoints, whole, asked, strict=True)
        )
        # Gradients are float64 here; each token's influence is rounded to float32 once.
        allowed = torch.from_numpy(abs(sdi).sum(1)[0]).double() * torch.finfo(torch.float32).eps
        error = (torch.from_numpy(sdi[0].astype(np.float64).sum(0)) - want).abs()
        assert bool((error <= allowed).all()), (error, allowed)
        assert bool((allowed < 1e-3 * want.abs().max()).all()), "cannot fail"


def test_losses_by_token_that_do_not_add_up_are_refused(project: Path, tmp_path: Path) -> None:
    write_project(project, ("token_losses(model, batch).sum(1)", "token_losses(model, batch).sum(1) / 2"))
    run = featurize(project, tmp_path / "run")
    with pytest.raises(ProjectError, match=r"token_losses\(\) adds up to .* make them add up"):
        token_features(run, run.store("train"), [3])
    write_project(
        project, ("def token_losses", "def other"), ("token_losses(model, batch).sum", "other(model, batch).sum")
    )
    with pytest.raises(ProjectError, match=r"has no token_losses; add def token_losses\(model, batch\)"):
        token_features(StoredRun.open(tmp_path / "run"), run.store("train"), [3])


def test_a_changed_loss_is_told_from_a_wrong_sum(project: Path, tmp_path: Path) -> None:
    run = featurize(project, tmp_path / "run")
    write_project(project, ("[:, :-1]\n", "[:, :-1] * 2\n"))
    with pytest.raises(ValueError, match="put the data and the loss back"):
        token_features(StoredRun.open(tmp_path / "run"), run.store("train"), [3])


def test_the_file_of_answers_is_small_and_plain(project: Path, tmp_path: Path) -> None:
    query = featurize(project, tmp_path / "run").store("query")
    stored = json.loads(answers_path(query.path).read_text())
    assert len(stored["answers"]) == 5
    assert np.all([len(entry) == 3 for entry in stored["answers"]])
