"""Tasks solved by an algorithm whose state after every step is known, to hold loop steps of a model against.

A task has a fixed number of tokens and steps. Its algorithm rewrites the values shown at the positions step by step:
``states[:, 0]`` is what is shown before the first step, ``states[:, -1]`` the answer. One input token is rare: it obeys
a rule of its own, so that the training examples holding it are the only ones the rule can be learnt from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor


class StepTask(ABC):
    """Inputs, and the states that the known algorithm takes them through.

    Attributes:
        name: of the task.
        rule: what the rare token means, for people.
        step_meaning: what the algorithm does in a step, for people.
        tokens: tokens of an input.
        steps: steps of the algorithm.
        vocab_in, vocab_out: numbers of input tokens and of values shown.
    """

    name: str
    rule: str
    step_meaning: str
    tokens: int
    steps: int
    vocab_in: int
    vocab_out: int

    @property
    def answer_positions(self) -> range:
        """Positions that hold the answer; the loss is taken there."""
        return range(self.tokens)

    def sample(self, count: int, generator: torch.Generator, *, rare: bool = False) -> Tensor:
        """Random inputs.

        Args:
            count: how many.
            generator: on the CPU; the same state gives the same inputs on every machine.
            rare: every input holds the rare token; otherwise none does.

        Returns:
            Token ids, int64 ``(count, tokens)``.

        Raises:
            TypeError, ValueError: ``count`` is not a positive int.
        """
        return self._draw(positive_int("count", count), generator, rare=rare)

    def states(self, inputs: Tensor) -> Tensor:
        """What the algorithm shows before the first step and after each step.

        Args:
            inputs: token ids, int64 ``(N, tokens)``.

        Returns:
            int64 ``(N, steps + 1, tokens)``, values in ``0 .. vocab_out - 1``.

        Raises:
            ValueError: inputs of another shape, or a token that the task does not have.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.tokens or inputs.dtype != torch.int64:
            raise ValueError(
                f"inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}; pass int64 of shape (N, {self.tokens})"
            )
        if len(inputs) and (int(inputs.min()) < 0 or int(inputs.max()) >= self.vocab_in):
            raise ValueError(
                f"inputs: got tokens {int(inputs.min())} .. {int(inputs.max())}; "
                f"task {self.name!r} has 0 .. {self.vocab_in - 1}"
            )
        return self._run(inputs)

    def changes(self, states: Tensor) -> Tensor:
        """How many answer positions change in each step: int64 ``(N, steps)`` from ``(N, steps + 1, tokens)``."""
        shown = states[..., self.answer_positions.start : self.answer_positions.stop]
        return (shown[:, 1:] != shown[:, :-1]).sum(2)

    @abstractmethod
    def has_rare(self, inputs: Tensor) -> Tensor:
        """Which inputs hold the rare token: bool ``(N,)``."""

    @abstractmethod
    def text(self, tokens: Tensor) -> str:
        """One input ``(tokens,)`` for people."""

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator, *, rare: bool) -> Tensor: ...

    @abstractmethod
    def _run(self, inputs: Tensor) -> Tensor: ...


def place_somewhere(inputs: Tensor, token: int, generator: torch.Generator, *, limit: Tensor | None = None) -> Tensor:
    """A copy of ``inputs`` ``(N, T)`` with ``token`` at one random position of each row.

    Args:
        inputs: token ids.
        token: what to place.
        generator: source of the positions.
        limit: ``(N,)``: place it before this position of the row; anywhere by default.
    """
    rows = torch.arange(len(inputs))
    ends = torch.full((len(inputs),), inputs.shape[1]) if limit is None else limit
    places = (torch.rand(len(inputs), generator=generator, dtype=torch.float64) * ends).long()
    placed = inputs.clone()
    placed[rows, places] = token
    return placed
