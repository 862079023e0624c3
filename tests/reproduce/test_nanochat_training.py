"""Training of the looped language model: stages, what they draw, a killed run that goes on, data by folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.nanochat import training
from reproduce.nanochat.config import CONFIGS, Config, StageConfig, Variant
from reproduce.nanochat.corpus import Corpus, load
from reproduce.nanochat.measure import checkpoints_at
from reproduce.nanochat.text import ASSISTANT, USER

PROTOCOL = Variant("protocol")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three stages of a few updates, on a folder of sums; one training and two test conversations are too long."""
    folder = tmp_path / "sums"
    folder.mkdir()
    for name, count in (("train", 9), ("test", 6)):
        records = [{"question": f"two and {k}", "answer": str(2 + k)} for k in range(count)]
        records += [{"question": "too long " * 9, "answer": "1"}] * (1 if name == "train" else 2)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return replace(
        CONFIGS["minute"],
        pretraining=StageConfig(5, 1),
        mid_training=StageConfig(7, 1),
        fine_tuning=StageConfig(8, 4),
        questions_as_text=True,
        spelling_tasks=4,
        batch=2,
        model=replace(CONFIGS["minute"].model, sequence_len=40),
        data=str(folder),
    )


class Killed(Exception):
    pass


def train(config: Config, corpus: Corpus, folder: Path) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    return training.train(config, PROTOCOL, corpus, folder, lambda _: None)


def test_a_killed_run_comes_to_the_same_numbers(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load(config)
    whole = train(config, corpus, tmp_path / "whole")
    monkeypatch.setattr(training, "KEEP_EVERY", 3)
    update, made = training._update, 0

    def until(last: int) -> None:
        def counted(*args: object) -> float:
            nonlocal made
            if made == last:
                raise Killed
            made += 1
            return update(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(training, "_update", counted)

    for last in (1, 5, 10, 17):  # before anything is kept, in pretraining, in mid-training, in fine-tuning
        until(last)
        with pytest.raises(Killed):
            train(config, corpus, tmp_path / "killed")
    until(1000)
    assert train(config, corpus, tmp_path / "killed") == whole
    assert made < 2 * 20  # it went on, and did not begin anew each time
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "killed").iterdir())
    for name in names:
        some, other = (torch.load(tmp_path / run / name) for run in ("whole", "killed"))
        for key, value in some["model"].items():
            assert torch.equal(value, other["model"][key]), (name, key)


def test_stages_in_order_and_their_checkpoints(config: Config, tmp_path: Path) -> None:
    corpus = load(config)
    assert corpus.stages == ("pretraining", "mid-training", "fine-tuning")
    made = train(config, corpus, tmp_path / "run")
    assert made["checkpoints"] == [f"protocol-fine-tuning-{u:06d}.pt" for u in (2, 4, 6, 8)]
    assert [row[0] for row in made["history"]] == list(range(1, 21))  # type: ignore[attr-defined]
    assert (tmp_path / "run" / "protocol-mid-training-000007.pt").exists()
    assert load(replace(config, data=None)).stages == ("pretraining",)
    assert load(replace(config, mid_training=StageConfig(0, 0))).stages == ("pretraining", "fine-tuning")


def test_what_each_stage_draws(config: Config) -> None:
    corpus = load(config)
    assert corpus.counts() == {
        "train": {"given": 10, "used": 9, "dropped": 1}, "test": {"given": 8, "used": 6, "dropped": 2}
    }  # fmt: skip
    assert [d.text for d in corpus.questions][:2] == ["two and 0", "two and 1"]
    assert len(load(replace(config, questions_as_text=False)).streams[0]) < len(corpus.streams[0])
    rng = np.random.default_rng(0)
    passages = corpus.draw("pretraining", size=3, rng=rng)
    assert bool(passages["mask"].all())
    assert {c.source for c in corpus.spelling} == {"spelling", "letters"}
    assert (len(corpus.mixture), corpus.mixture.dropped) == (9 + 2, 1 + 2)  # counting letters is too long for it
    mixed = corpus.draw("mid-training", size=8, rng=rng)
    own = corpus.draw("fine-tuning", size=8, rng=rng)
    for rows, counted in ((mixed, True), (own, False)):
        assert bool((rows["targets"] == USER).any())
        assert bool(rows["mask"][rows["targets"] == USER].all()) is counted
        assert not counted or bool(rows["mask"][rows["targets"] == ASSISTANT].all())
        assert int(rows["mask"][:, -1].sum()) > 0  # no column without a target that counts
    again = corpus.draw("fine-tuning", size=8, rng=np.random.default_rng((0, 5)))
    assert torch.equal(again["tokens"], corpus.draw("fine-tuning", size=8, rng=np.random.default_rng((0, 5)))["tokens"])


def test_loop_counts_are_of_the_stage() -> None:
    config = CONFIGS["gsm8k"]
    first, second = (training._loop_counts(config, stage, 2000) for stage in (0, 1))
    assert first == training._loop_counts(config, 0, 2000) != second
    assert {min(first), max(first)} == {1, config.max_loops}
    assert 4.7 < np.mean(first) < 5.2  # Poisson of mean 4, plus 1, clipped


def test_checkpoints_by_loop_count() -> None:
    config = replace(CONFIGS["minute"], stride=4, dense=(4,))
    paths = [Path(str(k)) for k in range(1, 10)]
    assert checkpoints_at(config, paths, 4) == paths
    assert checkpoints_at(config, paths, 5) == [Path("1"), Path("5"), Path("9")]
    assert checkpoints_at(replace(config, stride=1), paths, 5) == paths
    with pytest.raises(ValueError, match="stride, spelling_tasks: pass a stride of at least 1"):
        replace(config, stride=0)
