"""Copying a string into slots, one slot a step."""

from __future__ import annotations

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor

from reproduce.planted.tasks.step_task import StepTask, place_somewhere


class Copying(StepTask):
    """``length`` source positions, then as many empty slots; step ``t`` fills slot ``t``.

    Strings have 2 to ``length`` symbols; steps after the last symbol change nothing. The rare symbol is copied as any
    other, but it is an input and an output of its own: only examples that hold it teach it.

    Args:
        length: longest string, at least 2.
        symbols: number of symbols, the rare one included.
    """

    name = "copy"
    rule = "a symbol that no other example holds"
    step_meaning = "copies one symbol into its slot"

    def __init__(self, length: int = 6, symbols: int = 8) -> None:
        self.length, self.symbols = positive_int("length", length), positive_int("symbols", symbols)
        if length < 2 or symbols < 3:
            raise ValueError(f"length, symbols: got {length}, {symbols}; pass at least 2 and 3")
        self.tokens, self.steps = 2 * length, length
        self.rare, self.empty = symbols - 1, symbols
        self.vocab_in = self.vocab_out = symbols + 1

    @property
    def answer_positions(self) -> range:
        return range(self.length, self.tokens)

    def has_rare(self, inputs: Tensor) -> Tensor:
        return (inputs == self.rare).any(1)

    def text(self, tokens: Tensor) -> str:
        return "".join("_" if t == self.empty else "abcdefghijklmnopqrstuvwxyz"[t % 26] for t in tokens.tolist())

    def _draw(self, count: int, generator: torch.Generator, *, rare: bool) -> Tensor:
        lengths = torch.randint(2, self.length + 1, (count,), generator=generator)
        source = torch.randint(self.symbols - 1, (count, self.length), generator=generator)
        if rare:
            source = place_somewhere(source, self.rare, generator, limit=lengths)
        source = source.masked_fill(torch.arange(self.length) >= lengths[:, None], self.empty)
        return torch.cat([source, torch.full_like(source, self.empty)], 1)

    def _run(self, inputs: Tensor) -> Tensor:
        states = inputs[:, None].repeat(1, self.steps + 1, 1)
        for step in range(1, self.steps + 1):
            states[:, step:, self.length + step - 1] = inputs[:, step - 1, None]
        return states
