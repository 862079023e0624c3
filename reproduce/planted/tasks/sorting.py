"""Sorting by odd-even transposition: every step compares and swaps neighbours (the parallel bubble sort)."""

from __future__ import annotations

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor

from reproduce.planted.tasks.step_task import StepTask, place_somewhere


class Sorting(StepTask):
    """``length`` values; odd steps compare and swap positions (1, 2), (3, 4), …, even steps (2, 3), (4, 5), ….

    ``length`` steps sort every list (Knuth, The Art of Computer Programming, vol. 3, 5.3.4). The rare value is the
    largest: no other example shows where it belongs.

    Args:
        length: of the lists.
        values: number of values, the rare one included.
    """

    name = "sorting"
    rule = "a value that no other example holds"
    step_meaning = "compares and swaps every other pair of neighbours"

    def __init__(self, length: int = 6, values: int = 8) -> None:
        self.tokens = self.steps = positive_int("length", length)
        self.vocab_in = self.vocab_out = positive_int("values", values)
        if length < 2 or values < 3:
            raise ValueError(f"length, values: got {length}, {values}; pass at least 2 and 3")
        self.rare = values - 1

    def has_rare(self, inputs: Tensor) -> Tensor:
        return (inputs == self.rare).any(1)

    def text(self, tokens: Tensor) -> str:
        return " ".join(map(str, tokens.tolist()))

    def _draw(self, count: int, generator: torch.Generator, *, rare: bool) -> Tensor:
        drawn = torch.randint(self.rare, (count, self.tokens), generator=generator)
        return place_somewhere(drawn, self.rare, generator) if rare else drawn

    def _run(self, inputs: Tensor) -> Tensor:
        states = [inputs]
        for step in range(self.steps):
            state = states[-1].clone()
            left, right = state[:, step % 2 : -1 : 2], state[:, step % 2 + 1 :: 2]
            low, high = torch.minimum(left, right), torch.maximum(left, right)
            state[:, step % 2 : -1 : 2], state[:, step % 2 + 1 :: 2] = low, high
            states.append(state)
        return torch.stack(states, 1)
