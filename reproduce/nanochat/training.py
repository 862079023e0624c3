"""Training the looped language model in nanochat's way: Muon for matrices, AdamW for embedding and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from stepinfluence.files import write_atomically
from stepinfluence.models.gpt import LoopedGPT, gpt_loss, sample_loop_counts
from torch import Tensor, nn

from reproduce.nanochat.config import Config, StageConfig, Variant
from reproduce.nanochat.corpus import Batch, Corpus, Stage

WARMDOWN = 0.2
"""Share of the updates in which the learning rates fall linearly to zero, as in nanochat."""
KEEP_EVERY = 100
"""Updates between two states that a killed run goes on from."""
Optimizers: TypeAlias = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


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
    """Train a variant stage by stage, saving checkpoints. A run that was killed goes on from the state that it keeps
    aside: batches and loop counts are functions of the seed, the stage and the update, so that it comes to the same
    numbers (to the last bit on one machine and thread count).

    Args:
        config, variant, corpus: the run.
        folder: for the checkpoints (``.pt``: model, learning rate of the loop body, update).
        announce: told the loss ten times a stage.

    Returns:
        ``history``: update, loss in nats and loop count; ``checkpoints``: file names of the last stage, in order. An
        untrained variant has one checkpoint and no history.

    Raises:
        ValueError: training diverged.
    """
    model, key = make_model(config, variant), variant.key
    if not variant.trained:
        _save(folder / f"{key}.pt", model, make_optimizers(model, config)[0], 0)
        return {"history": [], "checkpoints": [f"{key}.pt"]}
    aside = folder / f"{key}-state.pt"
    begun = torch.load(aside, map_location="cpu", weights_only=True) if aside.exists() else None
    history: list[list[float]] = begun["history"] if begun else []
    if begun:
        model.load_state_dict(begun["model"])
    names: list[str] = []
    for index, name in enumerate(corpus.stages):
        stage = stage_config(config, name)
        names = [f"{key}-{name}-{u:06d}.pt" for u in sorted(checkpoint_updates(stage))]
        if begun and index < begun["stage"]:
            continue
        optimizers = make_optimizers(model, config)
        base = [group["lr"] for group in _groups(optimizers)]
        done = 0
        if begun and index == begun["stage"]:
            done = begun["update"]
            for optimizer, state in zip(optimizers, begun["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        counts = _loop_counts(config, index, stage.updates)
        for update in range(done + 1, stage.updates + 1):
            factor = learning_rate_factor(update, stage.updates)
            for group, rate in zip(_groups(optimizers), base, strict=True):
                group["lr"] = factor * rate
            rng = np.random.default_rng((config.seed, 1, index, update))
            batch = corpus.draw(name, size=config.batch, rng=rng)
            loss = _update(model, optimizers, batch, counts[update - 1], variant.bptt_k, config.device)
            history.append([len(history) + 1, loss, counts[update - 1]])
            if not math.isfinite(loss):
                raise ValueError(f"seed: training diverged at update {update} of {name}; try another seed")
            if update in checkpoint_updates(stage):
                _save(folder / f"{key}-{name}-{update:06d}.pt", model, optimizers[0], update)
            if update % max(1, stage.updates // 10) == 0:
                recent = [row[1] for row in history[-max(1, stage.updates // 10) :]]
                announce(f"{variant.name}: {name} {update}/{stage.updates}, loss {sum(recent) / len(recent):.3f}")
            if update % KEEP_EVERY == 0 or update == stage.updates:
                kept = {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "stage": index, "update": update, "history": history,
                }  # fmt: skip
                write_atomically(aside, partial(torch.save, kept))
    return {"history": history, "checkpoints": names}


def stage_config(config: Config, name: Stage) -> StageConfig:
    """Settings of a stage."""
    by_name = {
        "pretraining": config.pretraining,
        "mid-training": config.mid_training,
        "fine-tuning": config.fine_tuning,
    }
    return by_name[name]


def _update(
    model: LoopedGPT, optimizers: Optimizers, batch: Batch, steps: int, bptt_k: int | None, device: str
) -> float:
    """One update; returns the batch's loss in nats."""
    batch = {key: value.to(device) for key, value in batch.items()}
    loss = gpt_loss(partial(model, steps=steps, bptt_k=bptt_k), batch).mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _loop_counts(config: Config, stage: int, updates: int) -> list[int]:
    """Loop counts of a stage's updates."""
    seed = int(np.random.SeedSequence((config.seed, 2, stage)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    counts = sample_loop_counts(config.mean_loops, updates, maximum=config.max_loops, generator=generator)
    return [int(count) for count in counts]


def _groups(optimizers: Optimizers) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def make_optimizers(model: LoopedGPT, config: Config) -> Optimizers:
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
    content = {"model": model.state_dict(), "optimizer": optimizer, "update": update}
    write_atomically(path, partial(torch.save, content))
