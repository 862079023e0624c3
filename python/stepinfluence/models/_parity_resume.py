"""Where a training of the parity transformer stands, on file: a run that was stopped goes on from there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stepinfluence.files import save_torch, write_atomically

if TYPE_CHECKING:
    from stepinfluence.models._parity_training import Curriculum, ParityTrainConfig
    from stepinfluence.models.parity import ParityTransformer

SAVE_EVERY = 50
"""Optimizer steps between two states on file."""


@dataclass(frozen=True)
class HistoryRow:
    """One optimizer step: its number (from 1), loss in nats, curriculum state and learning rate."""

    step: int
    loss: float
    max_digits: int
    frontier_accuracy: float
    learning_rate: float


@dataclass
class TrainState:
    """All that the next optimizer step depends on, and what has been recorded so far.

    Attributes:
        config: the run.
        model, optimizer, curriculum: as they are.
        generator: draws the batches.
        history, checkpoints: as :class:`~stepinfluence.models.parity_task.TrainResult` has them.
        final_from: first step of the final phase; known once the curriculum is complete.
    """

    config: ParityTrainConfig
    model: ParityTransformer
    optimizer: torch.optim.Optimizer
    curriculum: Curriculum
    generator: torch.Generator
    final_from: int
    history: list[HistoryRow] = field(default_factory=list)
    checkpoints: list[tuple[int, float, int]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all.

        Raises:
            StoreError: the file could not be written.
        """
        content = {
            "config": repr(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": vars(self.curriculum),
            "generator": self.generator.get_state(),
            "final_from": self.final_from,
            "history": [asdict(row) for row in self.history],
            "checkpoints": self.checkpoints,
        }
        write_atomically(path, lambda aside: save_torch(content, aside))

    def take_up(self, path: Path) -> None:
        """Go on from a file that :meth:`save` wrote.

        Raises:
            ValueError: it is of a run with other settings.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["config"] != repr(self.config):
            raise ValueError(f"resume: {path} is of a run with other settings; remove it, or pass another file")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        vars(self.curriculum).update(content["curriculum"])
        self.generator.set_state(content["generator"])
        self.final_from = content["final_from"]
        self.history = [HistoryRow(**row) for row in content["history"]]
        self.checkpoints = [tuple(made) for made in content["checkpoints"]]
