"""A callback for Hugging Face's ``Trainer``: save what influence needs, at chosen optimizer steps.

callback = InfluenceCheckpoints("influence", count=10, body="albert.encoder.albert_layer_groups.0")
Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()

sdi featurize --project my_project.py --checkpoints 'influence/*.pt' --split train --out run
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stepinfluence.integrations.checkpointing import LoopCounter, Saver, Schedule


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
