"""A callback for Lightning's ``Trainer``: save what influence needs, at chosen optimizer steps.

callback = InfluenceCheckpoints("influence", count=10, module="network", body="core")
lightning.Trainer(max_steps=1000, callbacks=[callback]).fit(task, loader)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from stepinfluence.integrations.checkpointing import LoopCounter, Saver, Schedule


class InfluenceCheckpoints(Callback):
    """Saves weights, learning rate, second moments and loop counts into a folder that ``sdi featurize`` reads.

    The learning rate is that of the step just made, though Lightning has moved its schedulers on by then. Only the main
    process writes.

    Args:
        folder: of the checkpoints, ``step-<number>.pt``.
        every, at, count: at which optimizer steps, see :class:`~.checkpointing.Schedule`; the last is always saved.
        second_moments: save them, for influence under Adam's or Adafactor's metric.
        module: name of the submodule of the LightningModule that is the model to attribute; the whole without it.
        body: the loop body within that model, for the loop counts; none are kept without it.

    Attributes:
        saver: tells paths, bytes and seconds.

    Raises:
        ValueError: not exactly one of ``every``, ``at``, ``count``.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int | None = None,
        at: Iterable[int] | None = None,
        count: int | None = None,
        second_moments: bool = True,
        module: str = "",
        body: nn.Module | str | Sequence[nn.Module | str] | None = None,
    ) -> None:
        self.schedule = Schedule(every=every, at=at, count=count)
        self.saver = Saver(folder, second_moments=second_moments)
        self.module, self.body = module, body
        self._counter: LoopCounter | None = None
        self._stepped: tuple[torch.optim.Optimizer, list[float]] | None = None
        self._done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder and begin to count.

        Raises:
            ValueError: several optimizers, whose steps have no common number.
            CheckpointError: the folder holds later checkpoints of another run.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: the training has {len(trainer.optimizers)}; this callback serves one")
        self._done = trainer.global_step
        if trainer.is_global_zero:
            self.saver.begin(trainer.global_step)
        if self.body is not None:
            # The model itself is called within training_step, never through the LightningModule's own hooks.
            self._counter = LoopCounter(pl_module.get_submodule(self.module), self.body)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rates before a scheduler moves on."""
        self._stepped = optimizer, [float(group["lr"]) for group in optimizer.param_groups]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the batch ended an optimizer step and one is due."""
        step = trainer.global_step
        if step == self._done or self._stepped is None:  # gradients are being accumulated
            return
        self._done = step
        total = trainer.estimated_stepping_batches
        last = int(total) if total != float("inf") else None
        if trainer.is_global_zero and self.schedule.due(step, last):
            optimizer, rates = self._stepped
            counts = self._counter.take() if self._counter is not None else None
            model = pl_module.get_submodule(self.module)
            self.saver.save(step, model, optimizer, rates=rates, loop_counts=counts)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model without hooks."""
        if self._counter is not None:
            self._counter.remove()
