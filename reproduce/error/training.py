"""The task and the models: sums of neighbouring digits, learnt by a small looped GPT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from stepinfluence.models.blocks import MLP, RotaryTable
from stepinfluence.models.gpt import LoopedCore, LoopedGPT, LoopedGPTConfig, gpt_loss, sample_loop_counts
from torch import Tensor, nn

from reproduce.error.config import Config

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode, and the learning rate that it was reached with."""

    model: LoopedGPT
    eta: float


class SparseMLP(nn.Module):
    """An MLP with squared ReLU in which each token uses its ``active`` strongest hidden units; the others are zero."""

    def __init__(self, mlp: MLP, active: int) -> None:
        super().__init__()
        self.fc, self.proj, self.active = mlp.fc, mlp.proj, active

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself; ``(..., d_model)`` in and out."""
        hidden = F.relu(self.fc(x)).square()
        least = hidden.topk(self.active, dim=-1).values[..., -1:]
        return self.proj(hidden * (hidden >= least))  # type: ignore[no-any-return]  # nn.Module


class SlowCore(LoopedCore):
    """A loop body that goes only ``rate`` of the way: with a rate of one over the number of steps every step counts
    alike, however many there are, as in an integrated differential equation."""

    rate = 1.0

    def forward(self, state: Tensor, injected: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """The state after one more loop step; ``state`` and ``injected`` are ``(B, T, d_model)``."""
        return torch.lerp(state, super().forward(state, injected, rotary), self.rate)


class SlowGPT(LoopedGPT):
    """A looped GPT whose loop body is a :class:`SlowCore` at one over the number of steps."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__(config)
        fast, self.core = self.core, SlowCore(config)
        self.core.load_state_dict(fast.state_dict())

    def forward(self, tokens: Tensor, steps: int | None = None, **options: Any) -> Tensor:
        """As for :class:`LoopedGPT`."""
        self.core.rate = 1 / (self.config.steps if steps is None else steps)  # type: ignore[assignment]  # no tensor
        return super().forward(tokens, steps, **options)


KINDS = {"adapter": LoopedGPT, "slow": SlowGPT}


def neighbour_sums(config: Config, count: int, generator: torch.Generator) -> Batch:
    """Random digits, and each plus the one before it: ``tokens``, ``targets``, int64 ``(count, sequence_len)``."""
    digits = torch.randint(config.modulus, (count, config.model.sequence_len), generator=generator)
    return {"tokens": digits, "targets": (digits + F.pad(digits, (1, 0))[:, :-1]) % config.modulus}


def examples(config: Config, count: int) -> Batch:
    """What influence is computed on; the same for every model of a run."""
    return neighbour_sums(config, count, torch.Generator().manual_seed(config.seed + 2**33))


def make_model(config: Config, seed: int, *, kind: str = "adapter", active: int | None = None) -> LoopedGPT:
    """A model with random weights, which depend on ``seed`` alone.

    Args:
        config: shape.
        seed: of the weights.
        kind: of :data:`KINDS`.
        active: hidden units that a token may use; all by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LoopedGPT = KINDS[kind](config.model)
    if active is not None:
        for block in model.core.blocks:
            block.mlp = SparseMLP(block.mlp, active)  # type: ignore[arg-type]
    model.eval()
    return model


def train(
    config: Config, model: LoopedGPT, seed: int, *, checkpoints: int = 1, mean_loops: int | None = None
) -> list[Checkpoint]:
    """Train on fresh examples.

    Args:
        config: updates, batch size, learning rate.
        model: is trained in place.
        seed: of the data.
        checkpoints: how many, at even distances; the last is the trained model itself.
        mean_loops: loop steps are drawn anew for each update, with this mean and at most four times as many, as the
            paper draws them (D.3); the model's own number by default.
    """
    generator = torch.Generator().manual_seed(seed + 2**32)  # not the stream that made the weights
    loops = [model.config.steps] * config.updates
    if mean_loops is not None:
        loops = sample_loop_counts(mean_loops, config.updates, maximum=4 * mean_loops, generator=generator).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    kept = {round(config.updates * (k + 1) / checkpoints) for k in range(checkpoints)}
    found = []
    for update in range(1, config.updates + 1):
        rate = config.learning_rate * min(1.0, update / 20) * max(0.1, 1 - update / config.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        looped = partial(model, steps=loops[update - 1])
        gpt_loss(looped, neighbour_sums(config, config.batch, generator)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update in kept:
            found.append(Checkpoint(copy.deepcopy(model), rate))
    optimizer.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def accuracy(model: LoopedGPT, batch: Batch, *, loops: int | None = None) -> float:
    """Share of the sums that are right, after so many loop steps (the model's own number by default)."""
    return float((model(batch["tokens"], loops).argmax(-1) == batch["targets"]).float().mean())
