"""The Lightning callback in a real training: steps, learning rates, moments and loop counts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from stepinfluence import attach, load_checkpoint
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
        default_root_dir=tmp_path, val_check_interval=4,
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
