"""Adding two numbers, carries moving by one digit a step."""

from __future__ import annotations

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor

from reproduce.planted.tasks.step_task import StepTask, place_somewhere


class Addition(StepTask):
    """Two numbers of ``digits`` digits, least significant first; a token is a pair of digits.

    Step 1 adds each column by itself, modulo the base; every further step moves all pending carries one digit up
    (carry-save addition). Shown are the digits; before the first step, those of the first number. The last position is
    for the final carry: its pair is always (0, 0).

    The rare token is the pair (base - 1, base - 2), in this order: no other example shows what such a column gives.

    Args:
        digits: of each number.
        base: of the digits.
        chain: chance that a column adds up to ``base - 1``, so that it passes a carry on; with none, long carries are
            next to absent.
    """

    name = "addition"
    rule = "a pair of digits that no other example holds"
    step_meaning = "moves carries by one digit"

    def __init__(self, digits: int = 5, base: int = 6, chain: float = 0.4) -> None:
        self.digits, self.base = positive_int("digits", digits), positive_int("base", base)
        if base < 3:
            raise ValueError(f"base: got {base}; pass at least 3")
        if not 0 <= chain <= 1:
            raise ValueError(f"chain: got {chain}; pass a chance in 0 .. 1")
        self.chain = chain
        self.tokens = self.steps = digits + 1
        self.vocab_in, self.vocab_out = base * base, base
        self.rare = self.token(base - 1, base - 2)

    def token(self, first: int, second: int) -> int:
        """Id of a pair of digits."""
        return first * self.base + second

    def has_rare(self, inputs: Tensor) -> Tensor:
        return (inputs == self.rare).any(1)

    def text(self, tokens: Tensor) -> str:
        first, second = (
            "".join(str(int(d)) for d in reversed(part[: self.digits].tolist()))
            for part in (tokens // self.base, tokens % self.base)
        )
        return f"{first} + {second}"

    def _draw(self, count: int, generator: torch.Generator, *, rare: bool) -> Tensor:
        shape = (count, self.digits)
        first = torch.randint(self.base, shape, generator=generator)
        second = torch.randint(self.base, shape, generator=generator)
        passes_on = torch.rand(shape, generator=generator) < self.chain
        pairs = self.base * first + torch.where(passes_on, self.base - 1 - first, second)
        # What is drawn as the rare pair becomes its mirror image: the same sum, another token.
        pairs[pairs == self.rare] = self.token(self.base - 2, self.base - 1)
        if rare:
            pairs = place_somewhere(pairs, self.rare, generator)
        return torch.cat([pairs, torch.zeros(count, 1, dtype=torch.int64)], 1)

    def _run(self, inputs: Tensor) -> Tensor:
        first, second = inputs // self.base, inputs % self.base
        states = [first]
        columns = first + second
        for _ in range(self.steps):
            carry = torch.div(columns, self.base, rounding_mode="floor")
            columns = columns % self.base
            states.append(columns)
            columns = columns + carry.roll(1, 1)  # the last column adds up to 0 or 1: nothing comes around
        return torch.stack(states, 1)
