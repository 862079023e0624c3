"""The Lightning callback in a real training: steps, learning rates, moments and loop counts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from stepinfluence import LossError, TrainingInfluence, attach, load_checkpoint
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.integrations.checkpointing import read_loop_counts
from torch import Tensor, nn

lightning = pytest.importorskip("lightning.pytorch", reason="the lightning extra")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.core(x).tanh()
        return self.head(x)


class Task(lightning.LightningModule):  # type: ignore[misc]
    """A looped network that draws its number of loop steps, in a module that has other parameters, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.network = Network()
        self.drawn: list[int] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.drawn.append(random.randint(2, 4))
        return (self.scale * self.network(batch[0], self.drawn[-1])).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.network(batch[0], 9)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=6e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
def test_a_training(tmp_path: Path) -> None:
    from stepinfluence.integrations.lightning import InfluenceCheckpoints

    torch.manual_seed(0)
    random.seed(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 4)), batch_size=2)
    callback = InfluenceCheckpoints(tmp_path / "influence", at=[2, 4], module="network", body="core")
    task = Task()
    lightning.Trainer(
        max_steps=6, accumulate_grad_batches=2, callbacks=[callback], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
        default_root_dir=tmp_path, val_check_interval=3,
    ).fit(task, data, data)  # fmt: skip
    assert [p.name for p in callback.saver.paths] == [f"step-{n:07d}.pt" for n in (2, 4, 6)]
    saved = [load_checkpoint(p) for p in callback.saver.paths]
    assert [s.learning_rate for s in saved] == pytest.approx([5e-3, 3e-3, 1e-3])  # of the step itself
    counts = [read_loop_counts(p) for p in callback.saver.paths]
    for number, found in enumerate(counts):
        drawn = task.drawn[4 * number : 4 * number + 4]
        assert found == {steps: drawn.count(steps) for steps in sorted(set(drawn))}
    for name, value in task.network.state_dict().items():
        assert torch.equal(saved[-1].model[name], value)
    assert saved[-1].model.keys() == task.network.state_dict().keys()  # the network alone, not the task around it
    roots = from_optimizer(saved[-1].optimizer, task.network)
    assert roots is not None
    optimizer = task.optimizers().optimizer
    moment = optimizer.state[task.network.core.weight]["exp_avg_sq"] / (1 - 0.999**6)
    torch.testing.assert_close(roots["core.weight"].tensors[0], (moment.sqrt() + 1e-8).rsqrt())
    assert not task.network._forward_hooks

    network = Network()
    saved[0].load_into(network)
    capture = attach(network, body="core", sketch_size=8)
    features = capture.featurize([torch.randn(3, 4)], lambda model, x: model(x, 3).square().mean(1), progress=False)
    assert features.values.shape[:2] == (3, 3)


@pytest.mark.filterwarnings("ignore")
def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    from stepinfluence.integrations.lightning import InfluenceCheckpoints

    class Two(Task):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in (self.scale, self.network.core.weight)]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 4)), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=2, callbacks=[InfluenceCheckpoints(tmp_path, every=1)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the training has 2"):
        trainer.fit(Two(), data)


# --------------------------------------------------------------------------------------------------------------------
# Every update


class Scored(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, scores: Any, *, forgets: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = Network()
        self.scores, self.forgets = scores, forgets

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        losses = by_example(self.network, batch)
        if index == 5:
            return None  # left out
        return losses.mean() if self.forgets else self.scores.losses(losses).mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert self.scores.losses(by_example(self.network, batch)).shape == (2,)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_example(model: Any, batch: list[Tensor]) -> Tensor:
    return (model(batch[0], 3) - 1).square().mean(1)


POINTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
QUERY = [torch.randn(2, 4, generator=torch.Generator().manual_seed(2))]


def scored(tmp_path: Path, *, resume: str | None = None, **options: Any) -> tuple[Any, Scored]:
    from stepinfluence.integrations.lightning import InlineInfluence

    def begin(model: Any, optimizer: Any) -> TrainingInfluence:
        return TrainingInfluence(attach(model, body="core", sketch_size=64), optimizer, [QUERY], by_example)

    scores = InlineInfluence(begin, ids=lambda batch: batch[1], module="network")
    task = Scored(scores, **options)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(POINTS, torch.arange(16)), batch_size=2)
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    lightning.Trainer(
        max_steps=6, accumulate_grad_batches=2, callbacks=[scores, keep], accelerator="cpu", logger=False,
        gradient_clip_val=0.05, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        val_check_interval=3,
    ).fit(task, data, data, ckpt_path=resume)  # fmt: skip
    return scores, task


@pytest.mark.filterwarnings("ignore")
def test_every_update_of_a_trainer(tmp_path: Path) -> None:
    scores, _ = scored(tmp_path)
    updates, result = scores.influence.updates(), scores.influence.result()
    assert updates.learning_rates.tolist() == pytest.approx([0.6 * (1 - k / 6) for k in range(6)])
    assert list(result.train_ids) == [i for i in range(16) if i not in (10, 11)]
    torch.testing.assert_close(result.tracin.sum(0), updates.drops.sum(0))

    # The first update by hand, from the weights that training began with.
    network = Scored(None).network
    by_example(network, [POINTS[:4]]).mean().backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 0.05)
    assert norm > 0.05
    assert updates.factors[0].item() == pytest.approx(0.05 / float(norm), rel=1e-4)
    capture = attach(network, body="core", sketch_size=64)
    some = capture.featurize([[POINTS[:4]]], by_example, per_step=False).values.mean(0)
    query = capture.featurize([QUERY], by_example, per_step=False).values
    torch.testing.assert_close(updates.drops[0], 0.6 * 0.05 / norm * query @ some, rtol=1e-3, atol=1e-7)

    # From the end of the first epoch: within one, Lightning does not find the place in the data again.
    rest, _ = scored(tmp_path / "rest", resume=str(tmp_path / "step=4.ckpt"))
    assert rest.influence.result().train_ids == result.train_ids
    torch.testing.assert_close(rest.influence.result().sdi, result.sdi)
    assert repr(rest.influence) == repr(scores.influence)


@pytest.mark.filterwarnings("ignore")
def test_losses_that_are_not_handed_over_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(LossError, match="before losses were given"):
        scored(tmp_path, forgets=True)
    scores, _ = scored(tmp_path / "again")  # nothing was left open
    assert scores.influence.updates_made == 6
