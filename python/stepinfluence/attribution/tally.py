"""Influence summed by example while a model is trained, and what each update added to it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepinfluence.attribution.result import Influence

WRITTEN = (str, int, float, bool, bytes)
"""Types of ids that a file keeps, and tuples of them: it is read without running anything."""


@dataclass(frozen=True, eq=False)
class Updates:
    """What each update of a training contributed: K updates, those that were attributed.

    Attributes:
        numbers: ``(K,)`` int64, the optimizer's updates counted from 0.
        epochs: ``(K,)`` int64, from 0; all 0 unless epochs are kept apart.
        learning_rates: ``(K,)`` float64.
        factors: ``(K,)`` float64: what the gradient was multiplied by between backward passes and update (clipping, a
            scaler).
        ages: ``(K,)`` int64: how many updates before this one the queries were featurized.
        drops: ``(K, Q)``: by how much the update's examples together lowered each query's loss, to first order.
        energies: ``(K, Q)``: absolute influence of its examples, summed over examples and steps.
        losses: ``(K, Q)``: the queries' losses when they were featurized. How far they fell between two updates, beside
            the ``drops`` in between, says how far first order goes.
    """

    numbers: Tensor
    epochs: Tensor
    learning_rates: Tensor
    factors: Tensor
    ages: Tensor
    drops: Tensor
    energies: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


class Rows:
    """A tensor ``(N, *shape)`` that grows: rows beyond the last are zero."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self._data = torch.zeros(0, *shape, dtype=dtype)
        self._count = 0

    @property
    def values(self) -> Tensor:
        return self._data[: self._count]

    def reach(self, count: int) -> Tensor:
        """The rows, at least ``count`` of them."""
        if count > len(self._data):
            larger = self._data.new_zeros(max(count, 16, len(self._data) * 3 // 2), *self._data.shape[1:])
            larger[: self._count] = self.values
            self._data = larger
        self._count = max(self._count, count)
        return self.values

    def set(self, values: Tensor) -> None:
        """Take these rows in place of those that are there.

        Raises:
            ValueError: they are of another shape or dtype.
        """
        wanted = (len(values), *self._data.shape[1:])
        if values.shape != wanted or values.dtype != self._data.dtype:
            raise ValueError(f"{values.dtype} of shape {tuple(values.shape)}, not {self._data.dtype} of {wanted}")
        self._data, self._count = values.clone(), len(values)

    def append(self, row: Tensor) -> None:
        self.reach(self._count + 1)[-1] = row


class Tally:
    """Scores ``(example, query, query step)``, added up by example id.

    Memory: one number for each example that was seen, query, query step (and epoch, if they are kept apart), and
    three for each update and query.

    Args:
        query_ids: one for each of Q queries.
        steps: of the queries.
        dtype: of the sums.
        by_epoch: whether epochs are kept apart.
    """

    def __init__(self, query_ids: Sequence[Hashable], steps: int, dtype: torch.dtype, *, by_epoch: bool) -> None:
        self.query_ids, self.steps, self.dtype, self.by_epoch = tuple(query_ids), steps, dtype, by_epoch
        self._places: dict[Hashable, int] = {}
        self._sums: list[Rows] = []
        queries = len(self.query_ids)
        self._whole = Rows(3, dtype=torch.int64)  # number, epoch, age
        self._real = Rows(2, dtype=torch.float64)  # learning rate, factor
        self._drops, self._energies, self._losses = (Rows(queries, dtype=dtype) for _ in range(3))

    def add(
        self,
        ids: Sequence[Hashable],
        scores: Tensor,
        *,
        number: int,
        epoch: int,
        age: int,
        learning_rate: float,
        factor: float,
        losses: Tensor,
    ) -> None:
        """Add one update.

        Args:
            ids: of the B examples in it; an id that occurs twice is added twice.
            scores: ``(B, Q, steps)``, inner products; learning rate and factor are multiplied in here.
            number, epoch, age, learning_rate, factor, losses: see :class:`Updates`.
        """
        scores = scores * (learning_rate * factor)
        kept = epoch if self.by_epoch else 0
        while len(self._sums) <= kept:
            self._sums.append(Rows(len(self.query_ids), self.steps, dtype=self.dtype))
        places = [self._places.setdefault(i, len(self._places)) for i in ids]
        self._sums[kept].reach(len(self._places)).index_add_(0, torch.tensor(places, dtype=torch.int64), scores)
        self._whole.append(torch.tensor([number, kept, age]))
        self._real.append(torch.tensor([learning_rate, factor], dtype=torch.float64))
        self._drops.append(scores.sum((0, 2)))
        self._energies.append(scores.abs().sum((0, 2)))
        self._losses.append(losses)

    @property
    def _log(self) -> tuple[Rows, ...]:
        """What is kept of updates."""
        return self._whole, self._real, self._drops, self._energies, self._losses

    @property
    def examples(self) -> int:
        """How many different examples were seen."""
        return len(self._places)

    @property
    def epochs(self) -> int:
        """How many epochs are kept apart."""
        return len(self._sums)

    def updates(self) -> Updates:
        """What each update contributed; tensors of its own."""
        whole, real = self._whole.values.clone(), self._real.values.clone()
        return Updates(
            whole[:, 0], whole[:, 1], real[:, 0], real[:, 1], whole[:, 2],
            self._drops.values.clone(), self._energies.values.clone(), self._losses.values.clone(),
        )  # fmt: skip

    def influence(self, epoch: int | None = None) -> Influence:
        """The sums so far, of all epochs or of one; a row for each example in the order in which they came.

        Raises:
            ValueError: no such epoch, or epochs are not kept apart.
        """
        if epoch is not None and not self.by_epoch:
            raise ValueError(f"epoch: got {epoch}, but epochs were added up; pass by_epoch=True when you begin")
        if epoch is not None and not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch: got {epoch}; there are {self.epochs}, counted from 0")
        sdi = torch.zeros(self.examples, len(self.query_ids), self.steps, dtype=self.dtype)
        for rows in self._sums if epoch is None else [self._sums[epoch]]:
            sdi[: len(rows.values)] += rows.values
        updates = self.updates()
        chosen = updates.epochs == epoch if epoch is not None else slice(None)
        return Influence(
            sdi=sdi,
            decompose="query",
            train_ids=tuple(self._places),
            query_ids=self.query_ids,
            etas=tuple(updates.learning_rates[chosen].tolist()),
            energies=updates.energies[chosen],
        )

    # ----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it, of tensors and plain values.

        Raises:
            TypeError: an id is of a type that a file does not keep.
        """
        for i in (*self._places, *self.query_ids):
            if type(i) not in WRITTEN and not (isinstance(i, tuple) and all(type(part) in WRITTEN for part in i)):
                raise TypeError(f"ids: got {type(i).__name__} {i!r}, which a file cannot keep; use text or numbers")
        return {
            "query_ids": list(self.query_ids), "steps": self.steps, "dtype": self.dtype, "by_epoch": self.by_epoch,
            "ids": list(self._places), "sums": [rows.values.clone() for rows in self._sums],
            "log": [rows.values.clone() for rows in self._log],
        }  # fmt: skip

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Tally:
        """What :meth:`state` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is no such state.
        """
        tally = Tally(tuple(state["query_ids"]), state["steps"], state["dtype"], by_epoch=state["by_epoch"])
        ids, updates = state["ids"], [len(values) for values in state["log"]]
        tally._places = {i: k for k, i in enumerate(ids)}
        for values in state["sums"]:
            tally._sums.append(Rows(len(tally.query_ids), tally.steps, dtype=tally.dtype))
            tally._sums[-1].set(values)
        for rows, values in zip(tally._log, state["log"], strict=True):
            rows.set(values)
        seen = max((len(values) for values in state["sums"]), default=0)
        if (
            type(ids) is not list
            or type(tally.by_epoch) is not bool
            or seen != len(tally._places)
            or len(ids) != seen
            or len({*updates}) != 1
        ):
            raise ValueError(f"{seen} examples of {len(ids)} ids, and numbers of {sorted({*updates})} updates")
        return tally
