"""A checkpoint in memory, and how much it counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from stepinfluence.arguments import per_checkpoint
from stepinfluence.attribution.border import border
from stepinfluence.attribution.checkpoints.fitting import fit
from stepinfluence.errors import CheckpointError

Etas: TypeAlias = str | float | Sequence[float]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: where it came from.
        model: the model's state dict, names without wrapper prefixes.
        optimizer: the optimizer's state dict, if there was one; of several optimizers their groups and states together.
        updates: that had been made, where the file counts them (``step``, ``global_step``); else None.
    """

    path: Path
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None
    updates: int | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate in the optimizer state: the eta_k of TracIn (paper, eq. 1). Warns if it is 0.

        Raises:
            CheckpointError: there is no optimizer state, or its parameter groups have different learning rates.
        """
        if self.optimizer is None:
            raise CheckpointError(f"{self.path}: no learning rate in it (no optimizer state); give etas, or etas=1.0")
        with border(f"{self.path}: its optimizer state has no readable learning rate; give etas, or etas=1.0"):
            groups = self.optimizer.get("param_groups") or []
            rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
            if not all(map(math.isfinite, rates)):
                raise ValueError(f"got {rates}")
        if not rates:
            raise CheckpointError(
                f"{self.path}: no learning rate in it (its optimizer state has no 'lr'); give etas, or etas=1.0"
            )
        if len(rates) > 1:
            raise CheckpointError(
                f"{self.path}: its parameter groups have learning rates {rates}; give the body's as etas"
            )
        if rates[0] == 0:
            warnings.warn(
                f"{self.path}: its learning rate is 0 (saved before a warm-up began or after a schedule ended?), so "
                "that it counts for nothing; give etas if that is not meant",
                stacklevel=2,
            )
        return rates[0]

    def load_into(self, model: nn.Module, *, strict: bool = True, needed: Iterable[str] = ()) -> None:
        """Put the weights into ``model`` in place.

        Names may have a prefix that the model has not, or lack one (``model.`` in Lightning's files); of tied weights
        one name is enough; buffers that hold no weights (masks, positions, counts) may be missing or be more.

        Args:
            strict: False for a file with a part of the weights, such as adapters only: all others stay as they are.
            needed: names of parameters that must be there even then (the body's).

        Raises:
            CheckpointError: names or shapes do not fit (says which); the model is then unchanged.
        """
        with border(f"{self.path}: does not fit the model"):
            fit(self.path, self.model, model, strict=strict, needed=needed)


def resolve_etas(checkpoints: Sequence[object], etas: Etas) -> Callable[[int, Checkpoint], float]:
    """How much each checkpoint counts: ``"optimizer"`` (the learning rate in its optimizer state), one number for all,
    or a list with one number per checkpoint.

    Raises:
        ValueError, TypeError: ``etas`` is none of these, or has a wrong length.
    """
    if isinstance(etas, str):
        if etas != "optimizer":
            raise ValueError(f"etas: got {etas!r}; use 'optimizer', a number, or one number per checkpoint")
        return lambda _, checkpoint: checkpoint.learning_rate
    values = per_checkpoint("etas", etas, len(checkpoints))
    return lambda index, _: values[index]
