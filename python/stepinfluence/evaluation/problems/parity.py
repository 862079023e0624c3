"""The looped parity model of the paper (Appendix D.2) on short strings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems.common import planted, shortened
from stepinfluence.evaluation.training import Recipe
from stepinfluence.models.parity import ParityConfig, ParityTransformer
from stepinfluence.models.parity_task import ParityExample
from stepinfluence.models.parity_task import collate as collate_strings

Example = tuple[str, int]

PARITY = Recipe(200, 3e-3)


def parity(
    *,
    n_train: int = 192,
    n_query: int = 32,
    updates: int | None = None,
    longest: int = 7,
    width: int = 32,
    seed: int = 0,
) -> Problem:
    """Whether a string has an odd number of ones, read after as many loop steps as it has bits.

    One training label in sixteen is wrong.

    Args:
        n_train, n_query: strings.
        updates: in place of the recipe's.
        longest: bits of the longest strings; all shorter ones count as well.
        width: of the model, in heads of four.
        seed: of the data.

    Raises:
        ValueError: more strings than there are.
    """
    every = ["".join(bits) for n in range(1, longest + 1) for bits in itertools.product("01", repeat=n)]
    if n_train + n_query > len(every):
        raise ValueError(f"n_train, n_query: got {n_train} and {n_query}; parity has {len(every)} strings")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(every))
    wrong = planted(rng, n_train)
    truth = [bits.count("1") % 2 for bits in every]
    train = [(every[row], truth[row] ^ int(error)) for row, error in zip(order[:n_train], wrong, strict=True)]

    def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        strings = [ParityExample(k, bits) for k, (bits, _) in enumerate(examples)]
        made = collate_strings(strings, length=longest + 1)
        return made["tokens"], made["read_step"], torch.tensor([answer for _, answer in examples])

    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ParityTransformer(ParityConfig(d_model=width, n_heads=width // 4))

    return Problem(
        name="parity",
        train=train,
        queries=[(every[row], truth[row]) for row in order[n_train : n_train + n_query]],
        untrained=untrained,
        loss=loss,
        body=lambda model: model.block,  # type: ignore[return-value, arg-type]
        collate=collate,
        training=PARITY if updates is None else shortened(PARITY, updates),
        correct=correct,
        mislabelled=wrong,
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy ``(B,)`` at the "=" token."""
    return F.cross_entropy(_answers(model, batch), batch[2], reduction="none")


def correct(model: nn.Module, batch: Any) -> Tensor:
    """``(B,)`` bool."""
    return _answers(model, batch).argmax(1) == batch[2]


def _answers(model: nn.Module, batch: Any) -> Tensor:
    """Logits ``(B, vocab_size)`` at the "=" token, which stands after as many bits as there are loop steps to read."""
    tokens, read_step, _ = batch
    logits: Tensor = model(tokens, read_step)
    return logits.gather(1, read_step[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0]
