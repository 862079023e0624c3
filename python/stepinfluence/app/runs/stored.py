"""A run's folder, read: its stores, its project, and the features of new examples at its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stepinfluence.app.project import MapStyle, Project
from stepinfluence.app.runs.config import CONFIG, SUMMED_SPLIT, RunConfig
from stepinfluence.app.runs.examples import featurize_part
from stepinfluence.app.runs.pinned import Pins, changed_rows, pins_path
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.app.runs.workers import Worker
from stepinfluence.attribution.features import Features
from stepinfluence.errors import ConfigError, FeatureMismatchError, StoreError
from stepinfluence.search import Recompute
from stepinfluence.store import Store, fold
from stepinfluence.store.manifest import MANIFEST


class StoredRun:
    """The folder that ``sdi featurize`` wrote; made by :meth:`open`.

    Attributes:
        path: the folder.
        splits: names of the stores in it, ``train`` first.
    """

    def __init__(self, path: Path, splits: tuple[str, ...], device: torch.device | None) -> None:
        self.path, self.splits = path, splits
        self._device = device

    @classmethod
    def open(cls, path: str | Path, *, device: str | None = None) -> StoredRun:
        """Look into a run's folder.

        Args:
            device: where the model is to run, instead of the device in ``config.yaml``.

        Raises:
            StoreError: there is no store in it.
            ConfigError: there is no such device.
        """
        path, place = Path(path), None if device is None else Worker.here().device(device)
        if (path / MANIFEST).is_file():
            raise StoreError(f"{path}: is one store; give the run's folder, which holds it: {path.absolute().parent}")
        found = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
        if not found:
            raise StoreError(f"{path}: no run here (no folder in it holds a store); sdi featurize makes one")
        return cls(path, tuple(sorted(found, key=lambda name: name != SUMMED_SPLIT)), place)

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
    def config(self) -> RunConfig:
        """What was asked for.

        Raises:
            ConfigError: the run has no ``config.yaml``, or not a valid one.
        """
        file = self.path / CONFIG
        if not file.is_file():
            raise ConfigError(f"{self.path}: has no {CONFIG}, which names the project; featurize the run again")
        return RunConfig.load(file)

    @cached_property
    def prepared(self) -> Prepared:
        """The run's project, which is run, and its model.

        Raises:
            ConfigError: the run has no ``config.yaml``.
            StepInfluenceError: the project or a checkpoint is not as it must be.
        """
        device = self._device or Worker.here().device(self.config.device)
        return Prepared(Project.load(self.config.project), self.config, device)

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
            where = prepared.visit(checkpoint)
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
            # The capture tells the body's weights, the visit those of the whole model.
            features.append(dataclasses.replace(part.features.to("cpu"), space=where.space))
        if prepared.config.fold:
            return [fold(features, [c.eta for c in prepared.stored()], seed=prepared.config.seed)]
        return features

    def require_unchanged(self, store: Store) -> None:
        """Raise unless the project still gives the rows and losses of a store, looked at in one batch.

        Raises:
            FeatureMismatchError: it does not (says what differs).
        """
        settings = store.manifest.project
        data = self.prepared.project.dataset(str(settings.get("split", store.path.name)))
        size = int(settings.get("batch_size", 32))
        pins = Pins.read(pins_path(store.path))
        shards = [s for s in range(store.manifest.n_shards) if pins is None or not pins.excused(s)][:1]
        change = next(changed_rows(self.prepared, store, data, size, shards, to_the_bit=False), None)
        if change is not None:
            raise FeatureMismatchError(
                f"{store.path}: new examples cannot be compared with it, since the project has changed: {change}; put "
                "it back, or featurize again"
            )

    def examples(self, store: Store, rows: Sequence[int] | None = None) -> StoredExamples:
        """The examples of a store's rows (of all if not given), read from the project's dataset.

        Raises:
            StepInfluenceError: the project is not as it must be.
        """
        project = self.prepared.project
        data = project.dataset(str(store.manifest.project.get("split", store.path.name)))
        return StoredExamples(store, data, project, rows)

    def recompute(self, train: Store, query: MapStyle) -> Recompute:
        """What the exact influence of a store's rows on some examples is recomputed from, at the run's checkpoints.

        Raises:
            StepInfluenceError: as for :attr:`prepared`.
        """
        prepared = self.prepared
        return Recompute(
            prepared.capture,
            prepared.project.loss,
            self.examples(train),
            query,
            collate=prepared.batch,
            batch_size=int(train.manifest.project.get("batch_size", 32)),
            checkpoints=prepared.paths or None,
            metric=prepared.config.metric if prepared.paths else None,
            reader=prepared.project.reader,
        )


class StoredExamples:
    """The examples of rows of a store; reading one raises where the project's dataset has another one there now."""

    def __init__(self, store: Store, data: MapStyle, project: Project, rows: Sequence[int] | None = None) -> None:
        self._store, self._data, self._project = store, data, project
        self._rows = range(len(store)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Any:
        row = self._rows[index]
        stored = self._store.row(row).id
        example = self._data[row] if row < len(self._data) else None
        found = self._project.example_id(example, row) if row < len(self._data) else None
        if found != stored:
            raise FeatureMismatchError(
                f"{self._store.path}: row {row} was {stored!r}, the project's dataset now has {found!r} there; "
                "featurize again, or put the data back"
            )
        return example
