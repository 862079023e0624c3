"""A run's folder, read: its stores, its project, and the features of new examples at its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepinfluence.app.project import MapStyle, Project
from stepinfluence.app.runs.config import CONFIG, SUMMED_SPLIT, RunConfig
from stepinfluence.app.runs.examples import featurize_part
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.app.runs.workers import Worker
from stepinfluence.attribution.features import Features
from stepinfluence.errors import ConfigError, FeatureMismatchError, StoreError
from stepinfluence.search import rerank
from stepinfluence.store import Store, fold
from stepinfluence.store.manifest import MANIFEST


class StoredRun:
    """The folder that ``sdi featurize`` wrote; made by :meth:`open`.

    Attributes:
        path: the folder.
        splits: names of the stores in it, ``train`` first.
    """

    def __init__(self, path: Path, splits: tuple[str, ...], device: str | None) -> None:
        self.path, self.splits = path, splits
        self._device = device

    @classmethod
    def open(cls, path: str | Path, *, device: str | None = None) -> StoredRun:
        """Look into a run's folder.

        Args:
            device: where the model is to run, instead of the device in ``config.yaml``.

        Raises:
            StoreError: there is no store in it.
        """
        path = Path(path)
        if (path / MANIFEST).is_file():
            raise StoreError(f"{path}: is one store; give the run's folder, which holds it: {path.absolute().parent}")
        found = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
        if not found:
            raise StoreError(f"{path}: no run here (no folder in it holds a store); sdi featurize makes one")
        return cls(path, tuple(sorted(found, key=lambda name: name != SUMMED_SPLIT)), device)

    def store(self, split: str) -> Store:
        """The store of a split.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        if split not in self.splits:
            raise StoreError(f"{self.path}: no split {split!r} in it; it has {', '.join(self.splits)}")
        return Store.open(self.path / split)

    def other(self, train: str) -> str:
        """The split that queries come from unless told otherwise: the only other one, or ``train`` itself.

        Raises:
            StoreError: there are several others.
        """
        others = [name for name in self.splits if name != train]
        if len(others) > 1:
            raise StoreError(f"{self.path}: has splits {', '.join(others)}; say which to ask with --query")
        return others[0] if others else train

    @cached_property
    def prepared(self) -> Prepared:
        """The run's project and model.

        Raises:
            ConfigError: the run has no ``config.yaml``.
            StepInfluenceError: the project or a checkpoint is not as it must be.
        """
        file = self.path / CONFIG
        if not file.is_file():
            raise ConfigError(f"{self.path}: has no {CONFIG}, which names the project; featurize the run again")
        config = RunConfig.load(file)
        device = Worker.here().device(self._device or config.device)
        return Prepared(Project.load(config.project), config, device)

    def new_features(self, data: MapStyle, *, per_step: bool = True, batch_size: int = 32) -> list[Features]:
        """Features of examples that are in no store, as the run's stores have them: one per checkpoint, or one if the
        run's checkpoints are folded.

        Raises:
            ProjectError, LossError: an example cannot be featurized (names it).
            StepInfluenceError: the project or a checkpoint is not as it must be.
        """
        prepared = self.prepared
        features = []
        for checkpoint in range(prepared.count):
            prepared.visit(checkpoint)
            part = featurize_part(
                prepared,
                data,
                range(len(data)),
                per_step=per_step,
                batch_size=batch_size,
                on_error="stop",
                first_batch=0,
            )
            assert part.features is not None
            features.append(part.features.to("cpu"))
        if prepared.config.fold:
            return [fold(features, [c.eta for c in prepared.stored()], seed=prepared.config.seed)]
        return features

    def exact(
        self, train: Store, rows: Sequence[int], query: Sequence[Any], *, parameters: str | None = None
    ) -> Tensor:
        """Exact influence ``(len(rows), len(query), steps)`` of rows of a store on examples: recomputed from the model,
        without a sketch, summed over the run's checkpoints.

        Raises:
            FeatureMismatchError: a checkpoint is not the one that the store was made at, or the dataset has changed.
            StepInfluenceError: as for :meth:`new_features`.
        """
        prepared = self.prepared
        data = prepared.project.dataset(str(train.manifest.project.get("split", train.path.name)))
        examples = [self._same(train, data, row) for row in rows]
        size = int(train.manifest.project.get("batch_size", 32))
        total: Tensor | None = None
        for checkpoint in range(prepared.count):
            stored = prepared.visit(checkpoint)
            self._require_weights(train, checkpoint, stored.space.weights)
            sides = [
                [prepared.batch(side[start : start + size]) for start in range(0, len(side), size)]
                for side in (examples, list(query))
            ]
            found = rerank(
                prepared.capture, prepared.project.loss, sides[0], sides[1], parameters=parameters, progress=False
            )  # fmt: skip
            term = stored.eta * found.sdi.cpu()
            total = term if total is None else _padded_sum(total, term)
        assert total is not None
        return total

    def _same(self, store: Store, data: MapStyle, row: int) -> Any:
        stored = store.row(row).id
        example = data[row] if row < len(data) else None
        found = self.prepared.project.example_id(example, row) if row < len(data) else None
        if found != stored:
            raise FeatureMismatchError(
                f"{store.path}: row {row} was {stored!r}, the project's dataset now has {found!r} there; "
                "featurize again, or put the data back"
            )
        return example

    def _require_weights(self, store: Store, checkpoint: int, weights: str) -> None:
        fold_of = store.manifest.fold
        known = (
            [part["weights"] for part in fold_of["checkpoints"]]
            if fold_of is not None
            else [c.space.weights for c in store.checkpoints]
        )
        if checkpoint >= len(known) or known[checkpoint] != weights:
            raise FeatureMismatchError(
                f"{store.path}: the run's checkpoint {checkpoint} is not the one the store was made at; "
                "put its file back, or featurize again"
            )


def _padded_sum(a: Tensor, b: Tensor) -> Tensor:
    longest = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in (a, b))
    return a + b
