"""What the problems share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.evaluation.training import Recipe


def planted(rng: np.random.Generator, n_train: int) -> npt.NDArray[np.bool_]:
    """``(n_train,)``: one example in sixteen, drawn at random, whose answer is to be made wrong."""
    wrong = np.zeros(n_train, bool)
    wrong[rng.permutation(n_train)[: n_train // 16]] = True
    return wrong


def collate(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Both parts of some pairs, each stacked."""
    return torch.stack([first for first, _ in examples]), torch.stack([second for _, second in examples])


def shortened(recipe: Recipe, updates: int) -> Recipe:
    """The recipe with another number of updates, and at most half of them to warm up."""
    return replace(recipe, updates=updates, warmup=min(recipe.warmup, updates // 2))
