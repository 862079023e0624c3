"""Small trained models for :mod:`bench.store_layouts`: a looped GPT on source code, a looped transformer on parity."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss
from stepinfluence.models.parity import ParityConfig, ParityTransformer, parity_loss
from stepinfluence.models.parity_task import ParityTrainConfig, collate, make_heldout_set, train_parity
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model and what to ask it.

    Attributes:
        checkpoints: (state dict, learning rate) of three moments of the training.
        train, query: batches of training examples, and of examples that were not trained on.
        pilot: training examples beside ``train``, for measuring gradient energies.
    """

    name: str
    model: nn.Module
    body: str
    loss: Callable[[Any, Any], Tensor]
    checkpoints: list[tuple[dict[str, Tensor], float]]
    train: list[Batch]
    query: list[Batch]
    pilot: list[Batch]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _windows(text: Tensor, starts: Tensor, length: int) -> Batch:
    index = starts[:, None] + torch.arange(length)
    return {"tokens": text[index], "targets": text[index + 1]}


def gpt(steps: int, n_train: int, n_query: int) -> Case:
    """A looped GPT on bytes of a Python module: no biases and no gains, so every parameter is a matrix."""
    torch.manual_seed(0)
    length = 64
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    cut = len(text) * 9 // 10
    config = LoopedGPTConfig(
        vocab_size=256, d_model=128, n_heads=4, sequence_len=length, n_prelude=1, n_core=1, n_coda=1, steps=4
    )
    model = LoopedGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    checkpoints = []
    for step in range(1, steps + 1):
        starts = torch.randint(cut - length - 1, (16,))
        loss = gpt_loss(model, _windows(text, starts, length)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in (steps // 4, steps // 2, steps):
            checkpoints.append((_copy(model), 1e-3))
    starts = torch.randperm(cut - length - 1)
    train, pilot = starts[:n_train], starts[n_train : n_train + 32]
    query = torch.linspace(cut, len(text) - length - 2, n_query).long()
    batches = [[_windows(text, part, length) for part in side.split(16)] for side in (train, query, pilot)]
    return Case(f"looped GPT, loss {float(loss.detach()):.2f}", model, "core", gpt_loss, checkpoints, *batches)


def parity(steps: int, n_train: int, n_query: int) -> Case:
    """The paper's parity model at half its width: LayerNorm and biases, so most parameters are vectors."""
    digits = 10
    config = ParityTrainConfig(
        model=ParityConfig(d_model=128, n_heads=32),
        max_digits=digits,
        train_per_length=128,
        threshold=None,
        min_steps=steps // (digits + 2),
        final_steps=steps // 6,
        betas=(0.9, 0.99),
        clip_norm=0.1,
        checkpoint_digits=(5, 8),
    )
    checkpoints: list[tuple[dict[str, Tensor], float]] = []

    def save(_step: int, model: ParityTransformer, optimizer: torch.optim.Optimizer) -> None:
        checkpoints.append((_copy(model), float(optimizer.param_groups[0]["lr"])))

    result = train_parity(config, on_checkpoint=save, progress=False)
    order = torch.randperm(len(result.train_set), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [result.train_set[k] for k in order[: n_train + 32]]
    asked = make_heldout_set([digits - 1, digits], n_query // 2, exclude=result.train_set)

    def batches(side: list[Any]) -> list[Batch]:
        return [collate(side[k : k + 16], length=digits + 2) for k in range(0, len(side), 16)]

    return Case(
        f"parity, loss {result.history[-1].loss:.2f}", result.model, "block", parity_loss, checkpoints,
        batches(examples[:n_train]), batches(asked), batches(examples[n_train:]),
    )  # fmt: skip
