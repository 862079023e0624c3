"""What exact influence is recomputed from, and whether its examples are those that the features were computed from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from stepinfluence.attribution.checkpoints import PathLike, Reader
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.sameness import features_differ, losses_differ, precision
from stepinfluence.attribution.visiting import Metric, path_list, visit_checkpoints
from stepinfluence.capture import Capture
from stepinfluence.capture.pairs import PairRoute
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.loaders import LossFn
from stepinfluence.search.question import Question
from stepinfluence.search.rerank import QUERY_BYTES
from stepinfluence.search.sources import Folded, RowSource
from stepinfluence.store import checkpoint_of, fold


class Dataset(Protocol):
    """A map-style dataset: position ``r`` is row ``r`` of the features."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Recompute:
    """What exact influence is recomputed from.

    Attributes:
        capture, loss_fn: as for :func:`rerank`.
        train, query: the examples: position ``r`` is row ``r`` of the features of that side.
        collate: makes a batch of a list of examples.
        batch_size: examples per batch.
        checkpoints: files of the checkpoints that the features were computed at, in their order; not needed where the
            model has the weights of the only one. Each is loaded once.
        metric, reader: as for :func:`stepinfluence.influence_over_checkpoints`.
        route, query_bytes: as for :func:`rerank`.
    """

    capture: Capture
    loss_fn: LossFn
    train: Dataset
    query: Dataset
    collate: Callable[[list[Any]], Any] = default_collate
    batch_size: int = 16
    checkpoints: Sequence[PathLike] | None = None
    metric: Metric | None = None
    reader: Reader | None = None
    route: PairRoute = "auto"
    query_bytes: int = QUERY_BYTES

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}; give a positive number")
        if self.checkpoints is not None:
            object.__setattr__(self, "checkpoints", path_list(self.checkpoints))


class Batches:
    """Batches of some examples of a dataset, the same each time they are iterated."""

    def __init__(self, data: Dataset, rows: Tensor, exact: Recompute) -> None:
        self._data, self._rows, self._size, self._collate = data, rows.tolist(), exact.batch_size, exact.collate

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self._rows), self._size):
            yield self._collate([self._data[row] for row in self._rows[start : start + self._size]])


class RowCheck:
    """Some examples of one side, held against the losses and features that their rows have, checkpoint by checkpoint.

    A model in training mode draws other dropout for other batches: there, nothing is compared. Features are compared
    where the capture has their sketches, and losses in any case.
    """

    def __init__(self, side: str, source: RowSource, rows: Tensor, exact: Recompute, *, folded: Folded | None) -> None:
        self._side, self._source, self._exact, self._rows = side, source, exact, rows.tolist()
        self._folded = folded
        data = exact.train if side == "train" else exact.query
        self._batches = Batches(data, rows, exact)
        self._parts: list[Features] = []

    def visit(self, checkpoint: int) -> None:
        """Compare at a checkpoint, whose weights the model has now; of folded ones, at the last.

        Raises:
            FeatureMismatchError: an example is not the one that its row was computed from (names it).
        """
        exact, folded = self._exact, self._folded
        if exact.capture.training or not self._rows:
            return
        found = exact.capture.featurize(self._batches, exact.loss_fn, per_step=False, progress=False, verify=False).to(
            "cpu"
        )
        if folded is None:
            self._compare(checkpoint, found)
            return
        self._parts.append(found)
        if len(self._parts) == len(folded.parts):
            self._compare(0, fold(self._parts, [part.eta for part in folded.parts], seed=folded.seed))

    def _compare(self, checkpoint: int, found: Features) -> None:
        eps = precision(self._exact.capture.model, self._exact.capture.device)
        before = torch.from_numpy(self._source.losses(checkpoint))[self._rows].double()
        wrong, what = losses_differ(before, found.losses.double().cpu(), eps), "loss"
        space = self._source.spaces[checkpoint]
        if not bool(wrong.any()) and (space.blocks, space.tables) == (found.space.blocks, found.space.tables):
            rows = self._source.take(checkpoint, self._rows).double().cpu()
            rows = rows.sum(1) if rows.dim() == 3 else rows
            stored = self._source.stored_error(checkpoint, self._rows).double()
            wrong, what = features_differ(rows, found.values.double(), before, eps, stored), "gradient"
        if not bool(wrong.any()):
            return
        k = int(wrong.nonzero()[0])
        row = self._rows[k]
        numbers = f" ({float(before[k]):.6g} then, {float(found.losses[k]):.6g} now)" if what == "loss" else ""
        raise FeatureMismatchError(
            f"{self._side}: row {row} (id {self._source.id_of(row)!r}) is not the example that its features were "
            f"computed from: its {what} at checkpoint {checkpoint} is another one{numbers}; put the data and the loss "
            "back, or featurize again"
        )


def visited(
    question: Question, rows: Tensor, queries: Tensor, exact: Recompute
) -> Generator[tuple[int, float], None, None]:
    """Put each checkpoint that counts into the capture in turn, check some rows and queries at it, and give its number
    and its eta; the model's own weights are put back when the generator is closed.

    Raises:
        FeatureMismatchError: the model's weights or an example are not those of the features (says which).
    """
    train = question.train
    weights = question.etas if train.folded is None else tuple(part.eta for part in train.folded.parts)
    checks = [
        RowCheck("train", train, rows, exact, folded=train.folded),
        RowCheck("query", question.query, queries, exact, folded=train.folded),
    ]
    visits = visit_checkpoints(exact.capture, exact.checkpoints, weights, exact.metric, reader=exact.reader)
    with closing(visits) as every:
        for checkpoint, eta in enumerate(every):
            if train.folded is None and not eta:
                continue
            _require_weights(question, exact, checkpoint)
            for check in checks:
                check.visit(checkpoint)
            yield checkpoint, eta


def _require_weights(question: Question, exact: Recompute, checkpoint: int) -> None:
    """Raise unless the model has the weights, and the metric, that the features were computed with."""
    train, present = question.train, checkpoint_of(exact.capture, "present", 1.0).space
    space = train.spaces[checkpoint if train.folded is None else 0]
    wanted = space if train.folded is None else train.folded.parts[checkpoint]
    # Features in memory do not tell the weights outside of the body.
    if wanted.weights != present.weights or wanted.model_weights not in ("", present.model_weights):
        if exact.checkpoints is None:
            raise FeatureMismatchError(
                f"capture: its model does not have the weights of checkpoint {checkpoint} of the features; "
                "load that checkpoint, or pass checkpoints="
            )
        raise FeatureMismatchError(
            f"checkpoints: {exact.checkpoints[checkpoint]} does not hold the weights of checkpoint {checkpoint} of the "
            "features; give the same files in the same order, or featurize again"
        )
    if train.folded is None and space.metric != present.metric:
        raise FeatureMismatchError(
            "capture: another optimizer metric than the features'; attach with the same preconditioner"
        )
