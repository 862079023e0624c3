"""A learning problem that scores can be evaluated on: data, and a way to train again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepinfluence.attribution.features import Features
from stepinfluence.capture import Capture, ExactCapture
from stepinfluence.capture.body.targets import Body
from stepinfluence.evaluation.training import Recipe, Training


@dataclass(frozen=True)
class Problem:
    """Data, model and training of an evaluation.

    Attributes:
        name: for tables.
        train, queries: examples.
        untrained: ``untrained(seed) -> model``.
        loss: ``loss(model, batch) -> (B,)``.
        body: what the loop applies.
        collate: examples to a batch.
        training: how to train; then methods over checkpoints and by replay, and the metasmoothness, are there too.
        fit: ``fit(rows, seed) -> model``: training of your own in place of a recipe: a model trained on these training
            examples, in eval mode; the same for equal arguments.
        correct: ``correct(model, batch) -> (B,)`` bool; None where answers are not right or wrong.
        mislabelled: ``(n_train,)`` bool: planted errors; None for none.
        about: what a reader of the figures should know of the data.

    Raises:
        ValueError: both ``training`` and ``fit`` are given, or neither is.
    """

    name: str
    train: Sequence[Any]
    queries: Sequence[Any]
    untrained: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    body: Callable[[nn.Module], Body]
    collate: Callable[[Sequence[Any]], Any]
    training: Recipe | None = None
    fit: Callable[[npt.NDArray[np.int64], int], nn.Module] | None = None
    correct: Callable[[nn.Module, Any], Tensor] | None = None
    mislabelled: npt.NDArray[np.bool_] | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if (self.training is None) == (self.fit is None):
            given = "neither" if self.fit is None else "both"
            raise ValueError(f"{self.name}: training, fit: got {given}; give one of the two")

    def retrain(
        self, rows: npt.NDArray[np.int64], seed: int, weights: npt.NDArray[np.float64] | None = None
    ) -> nn.Module:
        """A model trained on these examples, in eval mode; the same for equal arguments.

        Args:
            rows: examples to train on.
            seed: of the training.
            weights: ``(n_train,)`` of the examples in the loss; ones if not given.

        Raises:
            ValueError: ``weights`` for a training of your own, which takes none.
        """
        if self.fit is None:
            training = Training(self, seed, rows)
            return training.model_at(training.final(None if weights is None else torch.from_numpy(weights)))
        if weights is not None:
            raise ValueError(f"{self.name}: weights: fit takes none; give a recipe (training=)")
        return self.fit(rows, seed)

    def batches(self, side: str, size: int = 64) -> list[Any]:
        """Batches of ``"train"`` or ``"query"`` examples, in order."""
        examples = self.train if side == "train" else self.queries
        return [self.collate(examples[k : k + size]) for k in range(0, len(examples), size)]

    def features(self, capture: Capture | ExactCapture, side: str) -> Features:
        """Features of ``"train"`` or ``"query"`` examples, summed over steps."""
        return capture.featurize(self.batches(side), self.loss, per_step=False, progress=False)

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
