"""A looped language model of a few thousand weights over digits, for the examples about texts."""

from __future__ import annotations

import torch
from stepinfluence.attribution.losses import token_losses
from stepinfluence.models import LoopedGPT, LoopedGPTConfig

VOCABULARY, LENGTH = 10, 8


def counting(n: int, step: int, seed: int) -> torch.Tensor:
    """``(n, LENGTH)`` sequences that count up by ``step`` modulo 10 from a random digit."""
    start = torch.randint(VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


def make_model(seed: int = 0) -> LoopedGPT:
    torch.manual_seed(seed)
    config = LoopedGPTConfig(
        vocab_size=VOCABULARY, d_model=32, n_heads=2, sequence_len=LENGTH, n_prelude=1, n_core=1, n_coda=1, steps=4
    )
    return LoopedGPT(config)


def train(model: LoopedGPT, tokens: torch.Tensor, updates: int = 60) -> LoopedGPT:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        token_losses(model(tokens), tokens).mean().backward()
        optimizer.step()
    return model.eval()
