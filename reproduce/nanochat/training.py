"""Training the looped language model in nanochat's way: Muon for matrices, AdamW for embedding and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stepinfluence.models.gpt import LoopedGPT, gpt_loss, sample_loop_counts
from torch import Tensor, nn

from reproduce.nanochat.config import Config, StageConfig, Variant
from reproduce.nanochat.corpus import Batch, Corpus

WARMDOWN = 0.2
"""Share of the updates in which the learning rates fall linearly to zero, as in nanochat."""


def make_model(config: Config, variant: Variant) -> LoopedGPT:
    """The model before training; an untrained variant has no layer at zero, which would have no gradient to show."""
    shape = replace(config.model, norm_state=variant.norm_state)
    if not variant.trained:
        shape = replace(shape, zero_init=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LoopedGPT(shape)
    if variant.adapter == "prelude":
        with torch.no_grad():
            d = shape.d_model
            model.core.adapter.weight.copy_(torch.cat((torch.zeros(d, d), torch.eye(d)), dim=1))
    return model.to(config.device)


def train(
    config: Config, variant: Variant, corpus: Corpus, folder: Path, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Train a variant, saving checkpoints of the last stage.

    Args:
        config, variant, corpus: the run.
        folder: for the checkpoints (``.pt``: model, learning rate of the loop body, update).
        announce: told the loss ten times a stage.

    Returns:
        ``history``: update, loss in nats and loop count; ``checkpoints``: file names, in order. An untrained variant
        has one checkpoint and no history.

    Raises:
        ValueError: training diverged.
    """
    model = make_model(config, variant)
    if not variant.trained:
        names = [f"{variant.name.replace(' ', '-')}.pt"]
        _save(folder / names[0], model, make_optimizers(model, config)[0], 0)
        return {"history": [], "checkpoints": names}
    generator = torch.Generator().manual_seed(config.seed + 2**32)  # not the stream that made the weights
    history: list[list[float]] = []
    names = []
    stages = [("pretraining", config.pretraining, False)]
    if corpus.fine_tuned:
        stages.append(("fine-tuning", config.fine_tuning, True))
    for name, stage, fine_tuning in stages:
        names = []  # influence is summed over the last stage's
        optimizers = make_optimizers(model, config)
        base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        counts = sample_loop_counts(
            config.mean_loops, stage.updates, maximum=config.max_loops, generator=generator
        ).tolist()
        for update in range(1, stage.updates + 1):
            factor = learning_rate_factor(update, stage.updates)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, base, strict=True):
                group["lr"] = factor * rate
            batch = corpus.draw(fine_tuning=fine_tuning, size=config.batch, generator=generator)
            batch = {key: value.to(config.device) for key, value in batch.items()}
            steps = counts[update - 1]
            forward = partial(model, steps=steps, bptt_k=variant.bptt_k)
            loss = gpt_loss(forward, batch).mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            history.append([len(history) + 1, float(loss.detach()), steps])
            if not math.isfinite(history[-1][1]):
                raise ValueError(f"seed: training diverged at update {update} of {name}; try another seed")
            if update in checkpoint_updates(stage):
                names.append(f"{variant.name.replace(' ', '-')}-{name}-{update:06d}.pt")
                _save(folder / names[-1], model, optimizers[0], update)
            if update % max(1, stage.updates // 10) == 0:
                recent = [row[1] for row in history[-max(1, stage.updates // 10) :]]
                announce(f"{variant.name}: {name} {update}/{stage.updates}, loss {sum(recent) / len(recent):.3f}")
    return {"history": history, "checkpoints": names}


def make_optimizers(model: LoopedGPT, config: Config) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of all blocks and the adapter, AdamW for embedding and head, with nanochat's settings."""
    outside = {id(model.embedding.weight), id(model.head.weight)}
    matrices = [p for p in model.parameters() if id(p) not in outside]
    width = (config.model.d_model / 768) ** -0.5
    adam = torch.optim.AdamW(
        [
            {"params": [model.embedding.weight], "lr": config.embedding_lr * width},
            {"params": [model.head.weight], "lr": config.head_lr * width},
        ],
        betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
    )  # fmt: skip
    return torch.optim.Muon(matrices, lr=config.matrix_lr, momentum=0.95, weight_decay=0.0), adam


def learning_rate_factor(update: int, updates: int) -> float:
    """1, then falling linearly over the last fifth; ``update`` counts from 1. Never 0: every update counts."""
    return min(1.0, (updates - update + 1) / max(1.0, WARMDOWN * updates))


def checkpoint_updates(stage: StageConfig) -> set[int]:
    """The updates after which a checkpoint is saved: at even distances, the last one at the end."""
    return {round(stage.updates * (k + 1) / stage.checkpoints) for k in range(stage.checkpoints)}


def at_depth(steps: int) -> Callable[[nn.Module, Batch], Tensor]:
    """Per-example loss at a fixed loop count with full backpropagation through all steps (paper, D.5 and Fig. 3)."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return gpt_loss(partial(model, steps=steps), batch)

    return loss_fn


def _save(path: Path, model: LoopedGPT, body_optimizer: torch.optim.Optimizer, update: int) -> None:
    # Of the optimizer only the learning rate is needed again: momentum would double the file.
    optimizer = {"state": {}, "param_groups": body_optimizer.state_dict()["param_groups"]}
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "update": update}, path)
