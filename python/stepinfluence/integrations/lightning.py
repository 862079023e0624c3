"""Callbacks for Lightning's ``Trainer``: save what influence needs, at chosen optimizer steps, or score every update as
it is made.

callback = InfluenceCheckpoints("influence", count=10, module="network", body="core")
lightning.Trainer(max_steps=1000, callbacks=[callback]).fit(task, loader)

scores = InlineInfluence(begin, ids=lambda batch: batch["id"], module="network")
lightning.Trainer(max_steps=1000, callbacks=[scores]).fit(Task(scores), loader)
scores.influence.result()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from stepinfluence.capture.inline import Inline
from stepinfluence.capture.training import Begin, TrainingInfluence
from stepinfluence.integrations.checkpointing import LoopCounter, Saver, Schedule
from stepinfluence.loaders import IdsOf


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
        _one_optimizer(trainer)
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


class InlineInfluence(Callback):
    """Scores every update as it is made (:class:`~stepinfluence.TrainingInfluence`), and goes on with that when
    training is resumed from a checkpoint.

    Each ``training_step`` hands its losses over::

        def training_step(self, batch, index):
            return self.scores.losses(loss_fn(self.network, batch)).mean()

    Args:
        begin: ``begin(model, optimizer) -> TrainingInfluence``, called when training begins.
        ids: ``ids(batch)``: one hashable per example.
        module: name of the submodule of the LightningModule that is the model to attribute; the whole without it.

    Attributes:
        influence: None before training begins.
    """

    def __init__(self, begin: Begin, *, ids: IdsOf, module: str = "") -> None:
        self._begin, self._ids, self.module = begin, ids, module
        self.influence: TrainingInfluence | None = None
        self._context: AbstractContextManager[Inline] | None = None
        self._inline: Inline | None = None
        self._restored: dict[str, Any] | None = None

    def losses(self, losses: Tensor) -> Tensor:
        """As :meth:`~stepinfluence.capture.inline.Inline.losses` in a training step; elsewhere what is given.

        Args:
            losses: ``(B,)``, one per example, not reduced.
        """
        return losses if self._inline is None else self._inline.losses(losses)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from a checkpoint.

        Raises:
            ValueError: several optimizers.
        """
        self.influence = self._begin(pl_module.get_submodule(self.module), _one_optimizer(trainer))
        if self._restored is not None:
            self.influence.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the context of the training step."""
        assert self.influence is not None
        self._context = self.influence.batch(batch, ids=self._ids(batch))
        self._inline = self._context.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close it.

        Raises:
            LossError: the training step did not hand its losses over.
        """
        if self._context is not None:
            context, self._context, self._inline = self._context, None, None
            context.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave out a batch that had no backward pass."""
        self._abandon()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing open."""
        self._abandon()
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizer no longer."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoints of Lightning."""
        return {} if self.influence is None else self.influence.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training begins."""
        self._restored = state_dict

    def _abandon(self) -> None:
        context, self._context, self._inline = self._context, None, None
        if context is not None:
            error = RuntimeError("no backward pass")
            with suppress(RuntimeError):
                context.__exit__(RuntimeError, error, None)

    def _close(self) -> None:
        if self.influence is not None:
            self.influence.close()


def _one_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    if len(trainer.optimizers) != 1:
        raise ValueError(f"optimizers: the training has {len(trainer.optimizers)}; this callback serves one")
    return trainer.optimizers[0]
