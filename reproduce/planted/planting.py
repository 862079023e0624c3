"""Training sets with planted examples, so that it is known which ones a query depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reproduce.planted.config import Config
from reproduce.planted.tasks.step_task import StepTask

Batch = Mapping[str, Tensor]
KINDS = ("duplicates", "poisoned", "rule")


@dataclass(frozen=True)
class Examples:
    """Inputs ``(N, tokens)`` and the states ``(N, steps + 1, tokens)`` that they are said to go through."""

    inputs: Tensor
    states: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Examples:
        return Examples(self.inputs[rows], self.states[rows])

    def batches(self, size: int = 64) -> Sequence[Batch]:
        """For ``featurize``: dicts of ``tokens`` and ``states``."""
        return [
            {"tokens": self.inputs[start : start + size], "states": self.states[start : start + size]}
            for start in range(0, len(self), size)
        ]


@dataclass(frozen=True)
class Planted:
    """A training set and queries, and what was planted for which.

    Attributes:
        train: examples; some carry a wrong answer.
        queries: with right answers; ``kind`` says what they are for.
        kind: one of :data:`KINDS` or ``"plain"`` for each query.
        critical: bool ``(n_train, n_query)``: what was planted for the query: its copies, its copies with a wrong
            answer, or every example of the rule.
        mislabelled: bool ``(n_train,)``: single examples with a wrong answer (the poisoned copies are none of them).
        wrong: bool ``(n_train,)``: all examples with a wrong answer.
    """

    train: Examples
    queries: Examples
    kind: tuple[str, ...]
    critical: npt.NDArray[np.bool_]
    mislabelled: npt.NDArray[np.bool_]
    wrong: npt.NDArray[np.bool_]

    def of_kind(self, kind: str) -> list[int]:
        """Columns of the queries of a kind."""
        return [i for i, k in enumerate(self.kind) if k == kind]


def clean(task: StepTask, inputs: Tensor) -> Examples:
    """Inputs with the states that they really go through."""
    return Examples(inputs, task.states(inputs))


def plant(task: StepTask, config: Config) -> Planted:
    """Make the training set and the queries of a task; the same config gives the same ones."""
    draw = Distinct(task, torch.Generator().manual_seed(config.seed))
    families, copies = config.families, config.copies
    ordinary = clean(task, draw(config.examples))
    wrong_singles = mislabel(task, draw(config.mislabelled), draw.generator)
    loved, poisoned = clean(task, draw(families)), clean(task, draw(families))
    right_copies = loved[torch.arange(families).repeat_interleave(copies)]
    # The copies of a query share one wrong answer, so that it can be learnt.
    wrong_copies = mislabel(task, poisoned.inputs, draw.generator)[torch.arange(families).repeat_interleave(copies)]
    rule = clean(task, draw(config.rule_examples, rare=True))
    rule_queries = clean(task, draw(config.rule_queries, rare=True))
    plain = clean(task, draw(config.plain_queries))

    parts = (ordinary, wrong_singles, right_copies, wrong_copies, rule)
    train = _join(*parts)
    ends = np.cumsum([len(p) for p in parts])
    part_of = np.searchsorted(ends, np.arange(len(train)), side="right")
    queries = _join(loved, poisoned, rule_queries, plain)
    kind = ("duplicates",) * families + ("poisoned",) * families + ("rule",) * len(rule_queries)
    kind += ("plain",) * len(plain)
    critical = np.zeros((len(train), len(queries)), dtype=bool)
    for family in range(families):
        for first, column in ((ends[1], family), (ends[2], families + family)):
            critical[first + copies * family : first + copies * (family + 1), column] = True
    critical[np.ix_(part_of == 4, [k == "rule" for k in kind])] = True
    return Planted(train, queries, kind, critical, part_of == 1, (part_of == 1) | (part_of == 3))


def mislabel(task: StepTask, inputs: Tensor, generator: torch.Generator) -> Examples:
    """Inputs with the states of other random inputs, whose answers differ.

    Raises:
        ValueError: no input with another answer turned up in 1000 draws.
    """
    right = task.states(inputs)
    states = right.clone()
    place = slice(task.answer_positions.start, task.answer_positions.stop)
    for _ in range(1000):
        same = (states[:, -1, place] == right[:, -1, place]).all(1)
        if not bool(same.any()):
            return Examples(inputs, states)
        states[same] = task.states(task.sample(int(same.sum()), generator))
    raise ValueError(f"task: {task.name!r} gives the same answer to every input; there is nothing to mislabel")


class Distinct:
    """Draws inputs of a task that were not drawn before, so that only planted copies are copies.

    Args:
        task: what to draw from.
        generator: source of randomness.
    """

    def __init__(self, task: StepTask, generator: torch.Generator) -> None:
        self.task, self.generator = task, generator
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, count: int, *, rare: bool = False) -> Tensor:
        """``count`` new inputs, int64 ``(count, tokens)``.

        Raises:
            ValueError: the task has not enough of them.
        """
        found = list(self._new(count, rare=rare))
        return torch.tensor(found)

    def _new(self, count: int, *, rare: bool) -> Iterator[tuple[int, ...]]:
        missing = count
        for _ in range(1000):
            for row in self.task.sample(missing, self.generator, rare=rare).tolist():
                if tuple(row) not in self._seen:
                    self._seen.add(tuple(row))
                    missing -= 1
                    yield tuple(row)
            if not missing:
                return
        raise ValueError(f"examples: task {self.task.name!r} has too few inputs for this; use longer ones or fewer")


def _join(*parts: Examples) -> Examples:
    return Examples(torch.cat([p.inputs for p in parts]), torch.cat([p.states for p in parts]))
