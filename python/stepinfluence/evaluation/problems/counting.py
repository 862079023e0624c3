"""Two toy problems that train in about a second: adding digits and counting symbols."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems.common import collate, planted, shortened
from stepinfluence.evaluation.training import Recipe

Example = tuple[Tensor, Tensor]


class LoopedClassifier(nn.Module):
    """One transformer layer applied ``steps`` times to embedded tokens; the answer is read off the mean token."""

    def __init__(self, vocabulary: int, tokens: int, classes: int, *, d: int = 32, steps: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(0.3 * torch.randn(tokens, d))
        self.core = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, classes)
        self.steps = steps

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of ``tokens (B, T)``."""
        x = self.embed(tokens) + self.position
        state = x
        for _ in range(self.steps):
            state = self.core(state + x)
        return self.head(state.mean(1))  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy ``(B,)``."""
    tokens, labels = batch
    return F.cross_entropy(model(tokens), labels, reduction="none")


def correct(model: nn.Module, batch: Any) -> Tensor:
    """``(B,)`` bool."""
    tokens, labels = batch
    return model(tokens).argmax(1) == labels  # type: ignore[no-any-return]


ADDER = Recipe(200, 3e-3, warmup=20, decay=True, root_epsilon=1e-8, weight_decay=0.3, batch_size=64)
MAJORITY = Recipe(60, 2e-3, warmup=10, decay=True, root_epsilon=1e-6)


def adder(**sizes: Any) -> Problem:
    """The sum of four digits modulo 3; arguments as for :func:`_make`."""
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    return _make("adder", every, every.sum(1) % 3, **{"recipe": ADDER, "n_train": 224, **sizes})


def majority(**sizes: Any) -> Problem:
    """Which of two symbols is more frequent among nine; arguments as for :func:`_make`."""
    every = torch.cartesian_prod(*[torch.arange(2)] * 9)
    return _make("majority", every, (every.sum(1) > 4).long(), **{"recipe": MAJORITY, **sizes})


def _make(
    name: str,
    every: Tensor,
    answers: Tensor,
    *,
    recipe: Recipe,
    n_train: int = 192,
    n_query: int = 32,
    updates: int | None = None,
    steps: int = 4,
    seed: int = 0,
) -> Problem:
    """Examples drawn from all there are; one training label in sixteen is wrong.

    Args:
        name: of the problem.
        every: ``(N, T)`` token ids.
        answers: ``(N,)``.
        recipe: of the training, in place of the problem's own.
        n_train, n_query: examples.
        updates: in place of the recipe's.
        steps: times that the model applies its layer.
        seed: of the data.

    Raises:
        ValueError: more examples than there are.
    """
    classes = int(answers.max()) + 1
    if n_train + n_query > len(every):
        raise ValueError(f"n_train, n_query: got {n_train} and {n_query}; {name} has {len(every)} examples")
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(every)))
    train, queries = order[:n_train], order[n_train : n_train + n_query]
    labels = answers[train].clone()
    mislabelled = planted(rng, n_train)
    labels[torch.from_numpy(mislabelled)] += 1
    labels %= classes
    tokens = every[train]

    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LoopedClassifier(int(every.max()) + 1, every.shape[1], classes, steps=steps)

    return Problem(
        name=name,
        train=list(zip(tokens, labels, strict=True)),
        queries=list(zip(every[queries], answers[queries], strict=True)),
        untrained=untrained,
        loss=loss,
        body=lambda model: model.core,  # type: ignore[return-value, arg-type]
        collate=collate,
        training=recipe if updates is None else shortened(recipe, updates),
        correct=correct,
        mislabelled=mislabelled,
    )
