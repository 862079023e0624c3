"""Running parity of a bit string, one position a step."""

from __future__ import annotations

import torch
from stepinfluence.arguments import positive_int
from torch import Tensor

from reproduce.planted.tasks.step_task import StepTask, place_somewhere


class RunningParity(StepTask):
    """Position ``i`` shows the parity of the bits up to ``i`` once step ``i`` has been made, its own bit before.

    (The parity of a whole string, read where it ends, is :mod:`stepinfluence.models.parity_task`, the paper's task.)
    The rare token is a reset: the parity starts over at 0. No other example shows that.

    Args:
        length: of the strings, at least 2.
    """

    name = "parity"
    rule = "a token that resets the parity, which no other example holds"
    step_meaning = "takes the parity one bit further"
    reset = 2

    def __init__(self, length: int = 7) -> None:
        if positive_int("length", length) < 2:
            raise ValueError(f"length: got {length}; pass at least 2")
        self.tokens, self.steps = length, length - 1
        self.vocab_in, self.vocab_out = 3, 2

    def has_rare(self, inputs: Tensor) -> Tensor:
        return (inputs == self.reset).any(1)

    def text(self, tokens: Tensor) -> str:
        return "".join("01R"[t] for t in tokens.tolist())

    def _draw(self, count: int, generator: torch.Generator, *, rare: bool) -> Tensor:
        bits = torch.randint(2, (count, self.tokens), generator=generator)
        return place_somewhere(bits, self.reset, generator) if rare else bits

    def _run(self, inputs: Tensor) -> Tensor:
        resets = inputs == self.reset
        states = [inputs.masked_fill(resets, 0)]
        for step in range(1, self.tokens):
            state = states[-1].clone()
            state[:, step] = torch.where(resets[:, step], 0, state[:, step] ^ state[:, step - 1])
            states.append(state)
        return torch.stack(states, 1)
