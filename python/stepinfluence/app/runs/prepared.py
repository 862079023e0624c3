"""A run's model, ready to be featurized: on its device, with a capture, moved from checkpoint to checkpoint."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stepinfluence.app.project import Project
from stepinfluence.app.runs.config import RunConfig
from stepinfluence.attribution.checkpoints import Checkpoint, is_checkpoint, load_checkpoint
from stepinfluence.attribution.curvature.progress import progress_at
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.capture import Capture, attach
from stepinfluence.errors import CheckpointError, ConfigError
from stepinfluence.store import StoredCheckpoint, checkpoint_of

PRESENT = "model()"
"""The name of the only checkpoint of a run without checkpoint files."""

NO_FILE = "the weights are those that the project's model() returns; name checkpoint files with --checkpoints"
"""Why it is not known how long such weights were trained."""


def expand(patterns: Sequence[str], *, any_path: bool = False) -> tuple[Path, ...]:
    """Files and folders of checkpoints that paths and glob patterns name, each pattern's in natural order (``step-9``
    before ``step-10``).

    Args:
        any_path: take any folder, too, for a reader of the user's.

    Raises:
        ConfigError: a pattern matches none.
    """

    def fits(path: Path) -> bool:
        return path.exists() if any_path else is_checkpoint(path)

    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if fits(Path(pattern)) else _matching(pattern)
        files = sorted((Path(match) for match in matches if fits(Path(match))), key=_natural)
        if not files and matches:
            raise ConfigError(
                f"checkpoints: {pattern!r} matches folders with no checkpoint in them ({matches[0]}); name the files, "
                f"such as {pattern.rstrip('/')}/*.pt"
            )
        if not files:
            raise ConfigError(f"checkpoints: {pattern!r} matches no file; quote patterns, so that the shell keeps them")
        found += files
    return tuple(dict.fromkeys(found))


def _matching(pattern: str) -> list[str]:
    """What a pattern matches. Folders that are there under the name as it stands are meant, brackets and all."""
    path = Path(pattern)
    there = next((parent for parent in path.parents if parent.exists()), None)
    if there is not None:
        literal = Path(glob.escape(str(there)), *path.parts[len(there.parts) :])
        if found := glob.glob(str(literal), recursive=True):  # noqa: PTH207  # absolute patterns
            return sorted(found)
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart: their paths from the folder that is common to all."""
    if not paths:
        return []
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(common).as_posix() for path in paths]


class Prepared:
    """A project's model with a capture, and the run's checkpoints.

    Attributes:
        project, config: whose.
        device: where the model is.
        capture: of the model's loop body.
        paths: the checkpoint files; empty where the model's own weights are used.
    """

    def __init__(self, project: Project, config: RunConfig, device: torch.device) -> None:
        self.project, self.config, self.device = project, config, device
        self.paths = expand(config.checkpoints, any_path=project.reader is not None)
        if not self.paths and config.metric != "sgd":
            raise ConfigError(
                f"metric: {config.metric!r} needs optimizer state; name checkpoints that hold it (--checkpoints)"
            )
        model = project.model(seed=config.seed).to(device)
        self.capture: Capture = attach(
            model,
            body=project.body(model),
            sketch_size=config.sketch_size,
            hashing=config.hashing,
            seed=config.seed,
            layout=config.layout,
            workspace=config.workspace,
            **project.attach_options(),
        )
        self._names = names_of(self.paths)
        self._at: int | None = None
        self._known: dict[int, StoredCheckpoint] = {}

    @property
    def count(self) -> int:
        """Checkpoints of the run, 1 where the model's own weights are used."""
        return max(1, len(self.paths))

    def visit(self, index: int) -> StoredCheckpoint:
        """Put the weights (and the metric) of a checkpoint into the model; nothing is done if they are there.

        Raises:
            CheckpointError: it cannot be read, does not fit, or lacks a learning rate or moments.
        """
        if self._at != index:
            eta = 1.0 if self.config.eta is None else self.config.eta
            name, progress = PRESENT, None
            if self.paths:
                self._at = None  # should loading fail half-way
                checkpoint = load_checkpoint(self.paths[index], reader=self.project.reader)
                checkpoint.load_into(self.capture.model)
                self.capture.precondition(
                    from_optimizer(checkpoint.optimizer, self.capture.model, self.config.metric)
                )  # fmt: skip
                eta, name = self._eta(checkpoint), self._names[index]
                if index not in self._known:
                    progress = progress_at(checkpoint, self.capture, metric=self.config.metric)
            self._at = index
            if index not in self._known:
                self._known[index] = checkpoint_of(self.capture, name, eta, progress or NO_FILE)
        return self._known[index]

    def _eta(self, checkpoint: Checkpoint) -> float:
        if self.config.eta is not None:
            return self.config.eta
        try:
            return checkpoint.learning_rate
        except CheckpointError as error:
            raise CheckpointError(f"{error} (on the command line: --eta 1)") from None

    def stored(self) -> tuple[StoredCheckpoint, ...]:
        """What a store tells of each checkpoint; visits those that have not been visited yet."""
        for index in range(self.count):
            if index not in self._known:
                self.visit(index)
        return tuple(self._known[index] for index in range(self.count))

    def batch(self, examples: Sequence[Any]) -> Any:
        """A batch of examples on the device."""
        return pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(self.device, non_blocking=True), self.project.collate(examples)
        )
