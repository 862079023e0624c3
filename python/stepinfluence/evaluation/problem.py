"""A learning problem that scores can be evaluated on: data, and a way to train again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepinfluence.capture.targets import Body


@dataclass(frozen=True)
class Problem:
    """Data, model and training of an evaluation.

    Attributes:
        name: for tables.
        train, queries: examples.
        fit: ``fit(rows, seed) -> model``: a model trained on these training examples; the same for equal arguments.
        untrained: ``untrained(seed) -> model``.
        loss: ``loss(model, batch) -> (B,)``.
        body: what the loop applies.
        collate: examples to a batch.
        correct: ``correct(model, batch) -> (B,)`` bool; None where answers are not right or wrong.
        mislabelled: ``(n_train,)`` bool: planted errors; None for none.
    """

    name: str
    train: Sequence[Any]
    queries: Sequence[Any]
    fit: Callable[[npt.NDArray[np.int64], int], nn.Module]
    untrained: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    body: Callable[[nn.Module], Body]
    collate: Callable[[Sequence[Any]], Any]
    correct: Callable[[nn.Module, Any], Tensor] | None = None
    mislabelled: npt.NDArray[np.bool_] | None = None

    def batches(self, side: str, size: int = 64) -> list[Any]:
        """Batches of ``"train"`` or ``"query"`` examples, in order."""
        examples = self.train if side == "train" else self.queries
        return [self.collate(examples[k : k + size]) for k in range(0, len(examples), size)]

    def query_losses(self, model: nn.Module) -> npt.NDArray[np.float64]:
        """``(n_query,)`` losses of a model in eval mode."""
        return self._each(model, self.loss).astype(np.float64)

    def query_correct(self, model: nn.Module) -> npt.NDArray[np.bool_]:
        """``(n_query,)``: which queries a model answers rightly.

        Raises:
            ValueError: the problem does not say what is right.
        """
        if self.correct is None:
            raise ValueError(f"{self.name}: does not say which answers are right (correct=None)")
        return self._each(model, self.correct).astype(bool)

    def _each(self, model: nn.Module, value: Callable[[nn.Module, Any], Tensor]) -> npt.NDArray[Any]:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return np.concatenate([value(model, batch).cpu().numpy() for batch in self.batches("query")])
        finally:
            model.train(training)
