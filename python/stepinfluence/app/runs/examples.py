"""Featurizing a range of a dataset: batches, and what becomes of examples that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepinfluence.app.project import MapStyle, Project
from stepinfluence.app.project_file import describe
from stepinfluence.app.runs.config import OnFailure
from stepinfluence.app.runs.prepared import Prepared
from stepinfluence.attribution.features import Features
from stepinfluence.errors import (
    BodyError,
    LayoutError,
    LossError,
    ProjectError,
    StepInfluenceError,
    UnsupportedUseError,
)
from stepinfluence.store import FailedRow, RowInfo

NOT_THE_EXAMPLES = (BodyError, LayoutError, UnsupportedUseError)
"""Errors that are the model's: leaving examples out would not mend them."""

REASON_LIMIT = 500


@dataclass(frozen=True)
class Part:
    """A range of a dataset, featurized at one checkpoint.

    Attributes:
        numbers: the rows of the dataset.
        features: of the examples that did not fail, in order; None if all did.
        rows: id, text and metadata of every example.
        failed: examples without features, and why.
    """

    numbers: range
    features: Features | None
    rows: tuple[RowInfo, ...]
    failed: tuple[FailedRow, ...]


def info_of(project: Project, example: Any, row: int) -> RowInfo:
    """What a store keeps of an example for people.

    Raises:
        ProjectError: the project's functions give something else than they must.
    """
    metadata = project.metadata(example) or None
    return RowInfo(project.example_id(example, row), project.text(example), metadata, project.tokens(example))


class PartLoader:
    """Batches of a range of a dataset, as ``Capture.featurize`` takes them; knows which rows the present batch has."""

    def __init__(self, source: PartSource, groups: Sequence[Sequence[int]]) -> None:
        self._source, self._groups = source, groups
        self.dataset = range(sum(map(len, groups)))  # tells featurize how many rows to expect
        self.current: Sequence[int] = ()

    def __iter__(self) -> Iterator[Any]:
        for group in self._groups:
            self.current = group
            try:
                batch = self._source.prepared.batch([self._source.examples[row] for row in group])
            except Exception as error:
                self._source.failing(group, error)
                continue
            yield batch
            self._source.done(len(group))

    def ids(self, _: Any) -> Sequence[Any]:
        """Ids of the batch that was last given."""
        return [self._source.infos[row].id for row in self.current]

    def on_error(self, error: Exception) -> None:
        """What to do when the batch that was last given could not be featurized."""
        self._source.failing(self.current, error)


class PartSource:
    """The examples of a range, and which of them have failed so far."""

    def __init__(
        self, prepared: Prepared, data: MapStyle, rows: range, on_error: OnFailure, done: Callable[[int], object]
    ) -> None:
        self.prepared, self.skip, self.done = prepared, on_error == "skip", done
        self.examples: dict[int, Any] = {}
        self.infos: dict[int, RowInfo] = {}
        self.failed: dict[int, str] = {}
        self.again: list[int] = []
        for row in rows:
            self._read(data, row)

    def _read(self, data: MapStyle, row: int) -> None:
        project = self.prepared.project
        try:
            example = data[row]
        except Exception as error:
            reason = f"reading the example failed: {describe(error, project.path)}"
            if not self.skip:
                raise ProjectError(f"row {row}: {reason}; --on-error skip goes on without it") from error
            self.infos[row] = RowInfo(f"row-{row}")
            self.failed[row] = reason[:REASON_LIMIT]
            return
        self.examples[row] = example
        self.infos[row] = info_of(project, example, row)

    def failing(self, rows: Sequence[int], error: Exception) -> None:
        """Note that a batch failed. One of a single example is given up; of others each is tried again by itself.

        Raises:
            StepInfluenceError: the error, if examples are not to be skipped, or if skipping them would not help.
        """
        first = f"row {rows[0]}" + (f" to {rows[-1]}" if len(rows) > 1 else "")
        named = f"{first} (id {', '.join(repr(self.infos[row].id) for row in rows[:3])}{', ...' * (len(rows) > 3)})"
        if isinstance(error, NOT_THE_EXAMPLES):
            raise error
        if not self.skip:
            if isinstance(error, LossError):  # names the examples itself
                raise LossError(f"{error} (--on-error skip goes on without them)") from error
            if isinstance(error, torch.OutOfMemoryError):
                raise ProjectError(f"{named}: out of memory on {self.prepared.device}; use a smaller --batch-size")
            what = str(error) if isinstance(error, StepInfluenceError) else describe(error, self.prepared.project.path)
            raise ProjectError(f"{named}: {what}") from error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(rows) > 1:
            self.again += rows
            return
        what = str(error) if isinstance(error, StepInfluenceError) else describe(error, self.prepared.project.path)
        self.failed[rows[0]] = " ".join(what.split())[:REASON_LIMIT]
        self.done(1)


def featurize_part(
    prepared: Prepared,
    data: MapStyle,
    rows: range,
    *,
    per_step: bool,
    batch_size: int,
    on_error: OnFailure,
    first_batch: int,
    done: Callable[[int], object] = lambda _: None,
) -> Part:
    """Featurize rows of a dataset at the checkpoint that ``prepared`` is at.

    A batch that fails is tried again example by example with ``on_error="skip"``, and the examples that fail by
    themselves are left out.

    Args:
        first_batch: number of the range's first batch in the whole dataset (random states go by it).
        done: called with the number of examples that have been dealt with, as they are.

    Raises:
        ProjectError, LossError: an example failed, with ``on_error="stop"`` (names it).
        BodyError, UnsupportedUseError, LayoutError: the model cannot be featurized.
    """
    source = PartSource(prepared, data, rows, on_error, done)
    good = [row for row in rows if row not in source.failed]
    # Cut by position, not among the good ones: a batch is then the same whichever examples elsewhere fail.
    cuts = [range(start, min(start + batch_size, rows.stop)) for start in range(rows.start, rows.stop, batch_size)]
    groups = [group for cut in cuts if (group := [row for row in cut if row in source.examples])]
    done(len(rows) - len(good))
    parts: list[tuple[list[int], Features]] = []
    for attempt, batches in enumerate((groups, None)):
        again = [[row] for row in source.again]
        chosen = batches if batches is not None else again
        if not chosen:
            continue
        loader = PartLoader(source, chosen)
        features = prepared.capture.featurize(
            loader,
            prepared.project.loss,
            per_step=per_step,
            ids=loader.ids,
            progress=False,
            first_batch=first_batch if attempt == 0 else first_batch + len(cuts) + 1,
            verify=None if attempt == 0 else False,
            on_error=loader.on_error,
        )
        left_out = source.failed.keys() | (set(source.again) if attempt == 0 else set())
        parts.append(([row for group in chosen for row in group if row not in left_out], features))
    infos = tuple(source.infos[row] for row in rows)
    failures = tuple(FailedRow(row, source.failed[row]) for row in rows if row in source.failed)
    return Part(rows, _joined(parts), infos, failures)


def _joined(parts: Sequence[tuple[Sequence[int], Features]]) -> Features | None:
    """Features of several sets of rows as one, in the order of the rows."""
    kept = [(rows, features) for rows, features in parts if len(features)]
    if len(kept) < 2:
        return kept[0][1] if kept else None
    numbers = [row for rows, _ in kept for row in rows]
    features = [f for _, f in kept]
    longest = max(features, key=lambda f: len(f.step_labels))
    values = longest.values.new_zeros(len(numbers), *longest.values.shape[1:])
    place = 0
    for f in features:
        target = values[place : place + len(f)]
        (target[:, : f.values.shape[1]] if f.per_step else target).copy_(f.values)
        place += len(f)
    lengths = [f.lengths for f in features if f.lengths is not None]
    whole = replace(
        longest,
        values=values,
        losses=torch.cat([f.losses for f in features]),
        steps=torch.cat([f.steps for f in features]),
        lengths=torch.cat(lengths) if lengths else None,
        ids=tuple(i for f in features for i in f.ids),
    )
    return whole.select(sorted(range(len(numbers)), key=numbers.__getitem__))
