"""What a report is made from: plain values and arrays, nothing of torch or of any task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stepinfluence.attribution.aggregation import FIRST_ORDER

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TrainItem:
    """A training example: its id, its text, and optionally its label and a group (such as its length)."""

    id: str
    text: str
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class QueryItem:
    """A query, with what the model makes of it.

    Attributes:
        id, text: as for a training example.
        loss: in nats, at the last checkpoint.
        truth, prediction: as they should be shown; the answer counts as right where they are equal.
        tokens: the text as the model reads it, token by token; empty to show the text alone.
        group: heading under which the query picker lists it.
        note: a remark for the picker ("alternating probe").
        read_step: 1-based loop step after which the answer is read; None for the last one.
        margin: ``(steps,)`` logit of the truth minus the best other one after each step, or None if not known.
    """

    id: str
    text: str
    loss: float
    truth: str
    prediction: str
    tokens: tuple[str, ...] = ()
    group: str = ""
    note: str = ""
    read_step: int | None = None
    margin: Array | None = None


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, 0 to 1, on one kind of input; ``trained``: whether training covered that kind."""

    name: str
    value: float
    trained: bool = True


@dataclass(frozen=True)
class Check:
    """A printed figure with its limit: ``value <= limit``, or ``>=`` where ``at_least``; limit None: no limit."""

    name: str
    value: str
    passed: bool
    meaning: str
    limit: str = ""


@dataclass(frozen=True)
class Stage:
    """Wall-clock and processor seconds of a stage, and peak resident memory during it in bytes (None: unknown)."""

    name: str
    seconds: float
    cpu_seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class View:
    """One way of adding up influence over checkpoints, or one checkpoint alone.

    Attributes:
        name: for the picker ("update 500 alone").
        sdi, unit, note: the view that is shown first, see :class:`View`.
        view: its name.
        others: further views that a reader can switch to.
        note: a sentence on how it was made.
    """

    name: str
    sdi: Array
    unit: str = FIRST_ORDER
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: the question that was asked, in plain words.
        lede: two or three sentences: the task, the model, what was scored.
        train, queries: rows and columns of ``sdi``.
        sdi, unit, note: the view that is shown first, see :class:`View`.
        view: its name.
        others: further views that a reader can switch to.
        grouped_by: what the training examples' groups are ("length").
        checkpoints: name of each checkpoint ("update 500").
        energy_by_checkpoint: ``(n_checkpoints, n_query)`` influence regardless of sign, summed over examples and steps:
            a checkpoint that holds most of a query's is named.
        checks, stages, accuracy: figures of the run.
        accuracy_of: what the kinds of input are ("bits in the string"), the x axis of the accuracy chart.
        accuracy_note: a sentence on what it was measured on.
        method: name and value of everything else worth recording.
        first_query: column shown first.
        command: how to make this page again.
    """

    title: str
    lede: str
    train: Sequence[TrainItem]
    queries: Sequence[QueryItem]
    sdi: Array
    unit: str = FIRST_ORDER
    note: str = ""
    view: str = "all checkpoints"
    others: Sequence[View] = ()
    grouped_by: str = "group"
    checkpoints: Sequence[str] = ()
    energy_by_checkpoint: Array | None = None
    checks: Sequence[Check] = ()
    stages: Sequence[Stage] = ()
    accuracy: Sequence[Accuracy] = ()
    accuracy_of: str = ""
    accuracy_note: str = ""
    method: Mapping[str, str] = field(default_factory=dict)
    first_query: int = 0
    command: str = ""

    @property
    def views(self) -> tuple[View, ...]:
        """All views, the first one first."""
        return (View(self.view, self.sdi, self.unit, self.note), *self.others)

    def __post_init__(self) -> None:
        shape = (len(self.train), len(self.queries))
        if self.sdi.ndim != 3 or self.sdi.shape[:2] != shape or 0 in self.sdi.shape:
            raise ValueError(
                f"sdi: got shape {self.sdi.shape}; pass (n_train, n_query, steps) with {shape[0]} training examples "
                f"and {shape[1]} queries, none of them zero"
            )
        for view in self.others:
            if view.sdi.shape != self.sdi.shape:
                raise ValueError(f"others: {view.name!r} has shape {view.sdi.shape}; pass {self.sdi.shape} as in sdi")
        if not all(np.isfinite(view.sdi).all() for view in self.views):
            raise ValueError("sdi: holds NaN or infinite values; nothing can be plotted from those")
        energy = self.energy_by_checkpoint
        if energy is not None and energy.shape != (len(self.checkpoints), len(self.queries)):
            raise ValueError(
                f"energy_by_checkpoint: got shape {energy.shape}; pass ({len(self.checkpoints)}, {len(self.queries)}), "
                "one row per checkpoint and one column per query"
            )
        if not 0 <= self.first_query < len(self.queries):
            raise ValueError(f"first_query: got {self.first_query}; there are {len(self.queries)} queries")
        steps = self.sdi.shape[2]
        for query in self.queries:
            if query.margin is not None and query.margin.shape != (steps,):
                raise ValueError(f"margin: query {query.id} has shape {query.margin.shape}; pass ({steps},)")
            if query.read_step is not None and not 1 <= query.read_step <= steps:
                raise ValueError(f"read_step: query {query.id} has {query.read_step}; pass 1 .. {steps}")
