"""A looped model and its loader as plain data: what is drawn, printed, replayed and shrunk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

Node: TypeAlias = dict[str, Any]
"""An operation of the body: its name under ``op``, its settings, and what it is wrapped around under ``inner``."""

KINDS = {
    "inner gradient": ("implicit", "hook grad", "hook grad in hook"),
    "folded": ("fold", "streams"),
    "unpadded": ("unpad",),
    "reordered": ("reorder", "subset", "parts every other", "parts buckets", "parts buckets, stack"),
    "routed": ("route",),
    "moving buffer": ("buffer", "running mean"),
}
"""The six kinds of wrong numbers of which this generator was made to find more, by the operations that make them."""


@dataclass
class Batch:
    """``lengths`` of the examples, padded with zeros to ``width``; the tokens follow from ``seed`` and ``style``.

    Styles: ``random``; ``sorted`` (by length, first token and sum: already in the order that a model would bring them
    in); ``first`` (the first B of the flattened tokens go to expert 0, no other does).
    """

    lengths: list[int]
    width: int
    seed: int
    style: str = "random"


@dataclass
class Spec:
    """One model with its batches.

    Attributes:
        seed: of the weights.
        d, heads: features, and heads of attention; ``d`` is a multiple of ``heads``.
        body: operations of one loop step, in order.
        loop: how the body is repeated, see :mod:`bench.fuzz.loops`; ``steps`` times.
        residual: how a step's output meets its input: ``none``, ``add``, or ``inject`` (the embedding is added).
        attach: ``whole`` (the body is one module), ``halves`` (two modules that follow each other), or ``inner`` (only
            modules within it that are entered once a step).
        readout: ``tokens`` or ``mean``.
        running: the model keeps a running mean of its activations, used before the loop and updated after it.
        training: featurize in training mode.
        mixes: the examples of a batch influence each other, so the model has to be refused.
        summed: featurize with ``per_step=False``.
    """

    seed: int
    d: int
    heads: int
    steps: int
    body: list[Node]
    batches: list[Batch]
    loop: str = "plain"
    residual: str = "add"
    attach: str = "whole"
    readout: str = "tokens"
    running: bool = False
    training: bool = False
    mixes: bool = False
    summed: bool = False

    def dump(self) -> str:
        """One line of JSON, read back by :func:`load`."""
        return json.dumps(asdict(self), separators=(",", ":"))

    def features(self) -> set[str]:
        """Names of what the model is made of: operations, with how they are written, and the loop."""
        found = {f"loop {self.loop}", f"attach {self.attach}"} | ({"running mean"} if self.running else set())
        for node in walk(self.body):
            found.add(node["op"])
            found |= {f"{node['op']} {value}" for key, value in node.items() if key in ("how", "back", "order")}
        if self.loop.startswith("implicit"):
            found.add("implicit")
        return found

    def kinds(self) -> list[str]:
        """Which of :data:`KINDS` the model has."""
        features = self.features()
        return [kind for kind, makers in KINDS.items() if features & set(makers)]


def walk(nodes: list[Node]) -> Iterator[Node]:
    """All nodes of a body, outer ones first."""
    for node in nodes:
        yield node
        yield from walk(node.get("inner", []))


def load(text: str) -> Spec:
    """The spec of a line of JSON."""
    data = json.loads(text)
    return Spec(**{**data, "batches": [Batch(**b) for b in data["batches"]]})
