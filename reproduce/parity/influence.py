"""SDI of the training subset on the probes, the test strings and itself, one checkpoint at a time (paper D.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stepinfluence import Capture, attach, influence, load_checkpoint, self_influence
from stepinfluence.attribution.features import Features
from stepinfluence.models.parity import ParityTransformer, parity_loss
from stepinfluence.models.parity_task import ParityExample, collate
from torch import Tensor

from reproduce.parity.config import Config

Batch = dict[str, Tensor]


class Attribution:
    """Scores a fixed training subset against fixed queries, at any checkpoint.

    Args:
        config: the experiment.
        train: training subset, in order of length.
        probes, test: queries, all of one length.
    """

    def __init__(
        self,
        config: Config,
        train: Sequence[ParityExample],
        probes: Sequence[ParityExample],
        test: Sequence[ParityExample],
    ) -> None:
        self.config = config
        self.train, self.queries, self.n_probes = list(train), [*probes, *test], len(probes)
        self.model = ParityTransformer(config.training.model).to(config.device)
        self.capture: Capture = attach(
            self.model, body=self.model.block, sketch_size=config.sketch_size, seed=config.seed
        )

    def at(self, checkpoint: Path, announce: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Influence at one checkpoint, times its learning rate.

        Args:
            checkpoint: with model and optimizer state.
            announce: told what goes on.

        Returns:
            ``probes`` ``(n_train, n_probes, steps)``; ``test_sum`` ``(n_test, steps)``, the sum over training examples
            for each test string, ``test_energy`` likewise of absolute values; ``tracin`` ``(n_train, n_test)``;
            ``own`` ``(n_train, train steps)``, self-influence; ``eta``.

        Raises:
            StepInfluenceError: the checkpoint cannot be read or does not fit.
        """
        loaded = load_checkpoint(checkpoint)
        loaded.load_into(self.model)
        eta = loaded.learning_rate
        steps = max(e.n_digits for e in self.train) + 2
        own = np.zeros((len(self.train), steps), dtype=np.float32)
        summed, done = [], 0
        announce(f"{checkpoint.stem}: training subset")
        for batch in self._batches(self.train, None):
            features = self._features(batch)
            per_step = self_influence(features, etas=eta).cpu().numpy()
            own[done : done + len(features), : per_step.shape[1]] = per_step
            summed.append(features.summed())
            done += len(features)
        announce(f"{checkpoint.stem}: queries")
        columns = []
        length = max(e.n_digits for e in self.queries) + 2
        for batch in self._batches(self.queries, length):
            features = self._features(batch)
            rows = [influence(block, features, etas=eta).sdi.cpu().numpy() for block in summed]
            columns.append(np.concatenate(rows))
        sdi = np.concatenate(columns, axis=1)
        probes, test = sdi[:, : self.n_probes], sdi[:, self.n_probes :]
        return {
            "probes": probes,
            "test_sum": test.sum(0),
            "test_energy": np.abs(test).sum(0),
            "tracin": test.sum(2),
            "own": own,
            "eta": eta,
        }

    def _batches(self, examples: Sequence[ParityExample], length: int | None) -> Iterator[Batch]:
        size = self.config.batch_size
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size], length=length)
            yield {name: value.to(self.config.device) for name, value in batch.items()}

    def _features(self, batch: Batch) -> Features:
        return self.capture.featurize([batch], parity_loss, per_step=True, progress=False)
