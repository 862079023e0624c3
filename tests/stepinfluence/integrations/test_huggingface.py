"""The Trainer callback: what it saves in a real training, and `sdi featurize` on its folder without further code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import albert_config, transformers
from stepinfluence import TrainingInfluence, attach, load_checkpoint
from stepinfluence.app.cli import app
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.errors import CheckpointError
from stepinfluence.integrations.checkpointing import read_loop_counts
from stepinfluence.integrations.huggingface import InfluenceCheckpoints, InfluenceTrainer
from stepinfluence.integrations.pretrained import Pretrained
from torch import Tensor
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


# --------------------------------------------------------------------------------------------------------------------
# Every update


def token_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").mean(1)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    drawn = torch.randint(5, 17, (2, count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": x, "labels": y, "id": 100 + k} for k, (x, y) in enumerate(zip(*drawn, strict=True))]


def stacked(some: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in some]) for name in ("input_ids", "labels")}


TRAIN, QUERY = rows(12, 1), stacked(rows(2, 2))


def scored(folder: Path, **options: Any) -> tuple[Any, Any]:
    """Six updates of two batches each, two epochs in all; the model as it was, and the trainer before training."""
    torch.manual_seed(0)
    model = transformers.AlbertForMaskedLM(albert_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 6e-2,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "warmup_steps": 0, "save_strategy": "steps",
        "save_steps": 3, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "seed": 0,
        "optim": "sgd", "max_grad_norm": 0.5,
    }  # fmt: skip

    def begin(model: Any, optimizer: Any) -> TrainingInfluence:
        capture = attach(model, body=BODY, sketch_size=64)
        return TrainingInfluence(capture, optimizer, [QUERY], token_loss, refresh_every=options.get("every", 1))

    trainer = InfluenceTrainer(
        model=model, args=transformers.TrainingArguments(**settings), train_dataset=TRAIN, eval_dataset=TRAIN[:4],
        influence=begin, loss_fn=token_loss,
    )  # fmt: skip
    return before, trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_update_of_a_trainer(tmp_path: Path) -> None:
    before, trainer = scored(tmp_path)
    trainer.train()
    updates, result = trainer.influence.updates(), trainer.influence.result()
    assert updates.learning_rates.tolist() == pytest.approx([6e-2 * (1 - k / 6) for k in range(6)])
    assert sorted(result.train_ids) == [100 + k for k in range(12)]
    assert result.sdi.shape == (12, 2, 3)
    torch.testing.assert_close(result.tracin.sum(0), updates.drops.sum(0))
    assert "6 updates;" in repr(trainer.influence)

    # The first update by hand, from the weights that training began with.
    model = transformers.AlbertForMaskedLM(albert_config())
    model.load_state_dict(before)
    first = stacked([TRAIN[i - 100] for i in result.train_ids[:4]])
    token_loss(model, first).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    assert updates.factors[0].item() == pytest.approx(0.5 / float(norm), rel=1e-4)
    capture = attach(model, body=BODY, sketch_size=64)
    some = capture.featurize([first], token_loss, per_step=False).values.mean(0)
    query = capture.featurize([QUERY], token_loss, per_step=False).values
    torch.testing.assert_close(updates.drops[0], 6e-2 * 0.5 / norm * query @ some, rtol=1e-3, atol=1e-7)

    assert "eval_loss" in trainer.evaluate()
    trainer.optimizer.step()
    assert trainer.influence.updates_made == 6  # watched no longer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_trainer_that_is_resumed_goes_on(tmp_path: Path) -> None:
    _, whole = scored(tmp_path / "whole", every=2)
    whole.train()
    _, rest = scored(tmp_path / "rest", every=2)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    one, two = whole.influence, rest.influence
    assert repr(one) == repr(two)
    assert one.updates().ages.tolist() == two.updates().ages.tolist() == [0, 1] * 3
    assert one.result().train_ids == two.result().train_ids
    torch.testing.assert_close(one.result().sdi, two.result().sdi)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_trainer_without_ids_is_refused(tmp_path: Path) -> None:
    _, trainer = scored(tmp_path)
    trainer.train_dataset = [{name: value for name, value in row.items() if name != "id"} for row in TRAIN]
    with pytest.raises(ValueError, match="id_column: the inputs have no 'id'"):
        trainer.train()
    with pytest.raises(ValueError, match="compute_loss_func: got a function"):
        InfluenceTrainer(influence=lambda *_: None, loss_fn=token_loss, compute_loss_func=token_loss)
