"""The Trainer callback: what it saves in a real training, and `sdi featurize` on its folder without further code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import albert_config, transformers
from stepinfluence import load_checkpoint
from stepinfluence.app.cli import app
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.errors import CheckpointError
from stepinfluence.integrations.checkpointing import read_loop_counts
from stepinfluence.integrations.huggingface import InfluenceCheckpoints
from stepinfluence.integrations.pretrained import Pretrained
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="the Trainer needs it")

TEXTS = [{"text": f"the {animal} {verb} a {colour} house"} for animal in ("cat", "dog") for verb in ("sees", "likes")
         for colour in ("red", "blue")]  # fmt: skip
BODY = "albert.encoder.albert_layer_groups.0"


def train(folder: Path, pretrained: Pretrained, tmp_path: Path, **options: Any) -> tuple[Any, InfluenceCheckpoints]:
    """Six optimizer steps of two forward passes each, with a learning rate that falls to 0."""
    data = pretrained.dataset("train")
    callback = InfluenceCheckpoints(folder, body=BODY, **options)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=6, per_device_train_batch_size=2, learning_rate=6e-3,
        gradient_accumulation_steps=2, lr_scheduler_type="linear", warmup_steps=0, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_strategy="no", use_cpu=True, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=pretrained.model(), args=arguments, train_dataset=data, data_collator=pretrained.collate,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer, callback


@pytest.fixture
def pretrained(saved: Callable[..., Path], lines: Callable[..., str]) -> Pretrained:
    return Pretrained(saved("AlbertForMaskedLM", albert_config()), lines(train=TEXTS, query=TEXTS[:2]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_training_and_its_features(pretrained: Pretrained, tmp_path: Path) -> None:
    trainer, callback = train(tmp_path / "influence", pretrained, tmp_path, at=[2, 4])
    paths = sorted((tmp_path / "influence").iterdir())
    assert [p.name for p in paths] == [f"step-{n:07d}.pt" for n in (2, 4, 6)]
    assert callback.saver.paths == paths
    # The rate of the step itself: 6e-3 (1 - (step - 1) / 6). By the end of the step it would be 0 at the last one.
    assert [load_checkpoint(p).learning_rate for p in paths] == pytest.approx([5e-3, 3e-3, 1e-3])
    assert [read_loop_counts(p) for p in paths] == [{3: 4}] * 3
    last = load_checkpoint(paths[-1])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(last.model[name], value)
    got, want = (
        from_optimizer(last.optimizer, trainer.model),
        from_optimizer(trainer.optimizer.optimizer, trainer.model),
    )
    assert got is not None
    assert want is not None
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name].tensors[0], want[name].tensors[0])
    assert not trainer.model._forward_hooks  # nothing is left behind

    project = tmp_path / "my_project.py"
    run = CliRunner().invoke(app, ["init", str(project), "--hf", pretrained.name, "--data", pretrained.data])
    assert run.exit_code == 0, run.output
    command = ["featurize", "-p", str(project), "-s", "train", "-s", "query", "--checkpoints"]
    command += [str(tmp_path / "influence" / "*.pt"), "--metric", "adam", "--sketch-size", "32", "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--threads", "1", "--out", str(tmp_path / "run"), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert [(split["rows"], split["complete"]) for split in report["splits"]] == [(8, True), (2, True)]
    from stepinfluence.store import Store

    store = Store.open(tmp_path / "run" / "query")
    assert [c.eta for c in store.checkpoints] == pytest.approx([5e-3, 3e-3, 1e-3])
    assert store.steps == 3
    assert store.row(0).text == TEXTS[0]["text"]


def test_data_without_splits_is_refused(tmp_path: Path) -> None:
    command = ["init", str(tmp_path / "p.py"), "--hf", "somewhere"]
    for data in ([], ["--data", "train.jsonl"]):
        run = CliRunner().invoke(app, [*command, *data])
        assert run.exit_code == 2
        assert "{split}" in run.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_count_and_a_folder_in_use(pretrained: Pretrained, tmp_path: Path) -> None:
    _, callback = train(tmp_path / "influence", pretrained, tmp_path, count=2, second_moments=False)
    assert [p.name for p in callback.saver.paths] == ["step-0000003.pt", "step-0000006.pt"]
    saved = load_checkpoint(callback.saver.paths[0]).optimizer
    assert saved is not None
    assert saved["state"] == {}
    with pytest.raises(CheckpointError, match=r"checkpoint\(s\) of another run"):
        train(tmp_path / "influence", pretrained, tmp_path, count=2)
