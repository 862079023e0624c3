"""Hugging Face's ``Trainer``: save what influence needs, at chosen optimizer steps, or score every update while it is
made.

callback = InfluenceCheckpoints("influence", count=10, body="albert.encoder.albert_layer_groups.0")
Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()

sdi featurize --project my_project.py --checkpoints 'influence/*.pt' --split train --out run

trainer = InfluenceTrainer(model=model, args=arguments, train_dataset=data, influence=begin, loss_fn=loss_fn)
trainer.train()
trainer.influence.result()
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stepinfluence.capture.inline import Inline
from stepinfluence.capture.training import Begin, TrainingInfluence
from stepinfluence.integrations.checkpointing import LoopCounter, Saver, Schedule
from stepinfluence.loaders import LossFn

STATE = "influence.pt"
"""Within a checkpoint of the Trainer's."""


class InfluenceCheckpoints(TrainerCallback):
    """Saves weights, learning rate, second moments and loop counts into a folder that ``sdi featurize`` reads.

    Saved is the state right after an optimizer step, before the scheduler moves on, with the learning rate of that very
    step: the eta of TracIn (paper, eq. 1). Only the main process writes.

    Args:
        folder: of the checkpoints, ``step-<number>.pt``.
        every, at, count: at which optimizer steps, see :class:`~.checkpointing.Schedule`; the last is always saved.
        second_moments: save them, for influence under Adam's or Adafactor's metric.
        body: the loop body, for the loop counts; none are kept without it.

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
        body: nn.Module | str | Sequence[nn.Module | str] | None = None,
    ) -> None:
        self.schedule = Schedule(every=every, at=at, count=count)
        self.saver = Saver(folder, second_moments=second_moments)
        self.body = body
        self._counter: LoopCounter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Check the folder and begin to count.

        Raises:
            CheckpointError: the folder holds later checkpoints of another run.
        """
        if state.is_world_process_zero:
            self.saver.begin(state.global_step)
        if self.body is not None:
            self._counter = LoopCounter(given["model"], self.body)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Save if it is due."""
        step = state.global_step + 1  # raised after this event
        if state.is_world_process_zero and self.schedule.due(step, state.max_steps):
            optimizer: torch.optim.Optimizer = given["optimizer"]
            counts = self._counter.take() if self._counter is not None else None
            self.saver.save(step, given["model"], optimizer, loop_counts=counts)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Leave the model without hooks."""
        if self._counter is not None:
            self._counter.remove()


class InfluenceTrainer(Trainer):
    """A ``Trainer`` that scores every update as it is made (:class:`~stepinfluence.TrainingInfluence`), and goes on
    with that when it is resumed from a checkpoint of its own.

    It comes first where it is one of several bases: ``class Mine(InfluenceTrainer, SFTTrainer)``.

    Args:
        influence: ``influence(model, optimizer) -> TrainingInfluence``, called before the first update.
        loss_fn: ``loss_fn(model, inputs) -> (B,)``, one loss per example. The training loss is their mean; evaluation
            goes by the model's own.
        id_column: of the data; it reaches neither the model nor ``loss_fn``.
        *args, **options: of ``Trainer``.

    Attributes:
        influence: None before the first update.

    Raises:
        ValueError: ``compute_loss_func`` is given, too.
    """

    influence: TrainingInfluence | None

    def __init__(self, *args: Any, influence: Begin, loss_fn: LossFn, id_column: str = "id", **options: Any) -> None:
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: got a function beside loss_fn; loss_fn is the training loss, by example"
            )
        self._begin, self._loss_fn, self._id_column = influence, loss_fn, id_column
        self.influence = None
        self._ids: Sequence[Hashable] | None = None
        self._inline: Inline | None = None
        self._resumed: str | None = None
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # a mean by example; the Trainer divides by accumulated batches

    def train(self, *args: Any, **options: Any) -> Any:
        """As ``Trainer.train``; the optimizer is watched no longer than that."""
        self.influence = self._resumed = None
        try:
            return super().train(*args, **options)
        finally:
            if self.influence is not None:
                self.influence.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """As ``Trainer.training_step``, and featurized on the way.

        Raises:
            ValueError: the inputs have no ids.
        """
        if self.influence is None:
            trained: Any = self.model
            wrapped: Any = self.optimizer
            self.influence = self._begin(trained, getattr(wrapped, "optimizer", wrapped))  # accelerate's wrapper
            if self._resumed is not None:
                self.influence.restore(Path(self._resumed, STATE))
        inputs = self._prepare_inputs(inputs)
        if self._ids is None:
            raise ValueError(f"id_column: the inputs have no {self._id_column!r}; give every example an id in the data")
        try:
            with self.influence.batch(inputs, ids=self._ids) as self._inline:
                loss: Tensor = super().training_step(model, inputs, *args, **options)
        finally:
            self._inline = None
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the mean of ``loss_fn``; otherwise as ``Trainer.compute_loss``."""
        if self._inline is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._inline.losses(self._loss_fn(model, inputs)).mean()

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = dict(inputs)
        self._ids = inputs.pop(self._id_column, None)
        return super()._prepare_inputs(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._id_column not in columns:
            columns.append(self._id_column)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.influence is not None:
            self.influence.save(Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}", STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed = checkpoint
