"""Training of the small looped model, and its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.planted.config import Config
from reproduce.planted.model import LoopedRewriter, RewriterConfig
from reproduce.planted.planting import Batch, Examples
from reproduce.planted.tasks.step_task import StepTask

Loss = Callable[[LoopedRewriter, Batch], Tensor]


def answer_loss(task: StepTask) -> Loss:
    """Cross-entropy of the answer after the last step, mean over its positions, in nats: ``(B,)``."""
    place = _answer(task)

    def loss(model: LoopedRewriter, batch: Batch) -> Tensor:
        logits = model(batch["tokens"])[:, place]
        return F.cross_entropy(logits.transpose(1, 2), batch["states"][:, -1, place], reduction="none").mean(1)

    return loss


def every_step_loss(task: StepTask) -> Loss:
    """Cross-entropy of the algorithm's state after every step, mean over steps and positions, in nats: ``(B,)``."""
    place = _answer(task)

    def loss(model: LoopedRewriter, batch: Batch) -> Tensor:
        states = torch.stack(model.hidden(batch["tokens"]), 1)[:, :, place]
        logits = model.read_out(states).flatten(1, 2)
        targets = batch["states"][:, 1:, place].flatten(1)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)

    return loss


def make_model(task: StepTask, config: Config, seed: int) -> LoopedRewriter:
    """A model with random weights, which depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoopedRewriter(
            RewriterConfig(
                task.vocab_in, task.vocab_out, task.tokens, task.steps, d_model=config.d_model, n_heads=config.n_heads
            )
        )


def train(
    task: StepTask,
    examples: Examples,
    config: Config,
    *,
    loss: Loss,
    seed: int,
    steps: int | None = None,
    folder: Path | None = None,
) -> tuple[LoopedRewriter, list[Path]]:
    """Train a model with AdamW.

    Args:
        task: for the shape of the model.
        examples: gone through in a new random order again and again.
        config: number of steps, batch size, learning rate, checkpoints.
        loss: :func:`answer_loss` or :func:`every_step_loss` of the task.
        seed: of weights and order.
        steps: of the optimizer; ``config.train_steps`` by default.
        folder: for checkpoints (weights and optimizer state); none are made if not given.

    Returns:
        The model in eval mode, on the device that was used (a GPU where there is one), and the checkpoints' paths.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(task, config, seed).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    order = _order(len(examples), config.batch_size, torch.Generator().manual_seed(seed + 2**32))
    steps = config.train_steps if steps is None else steps
    saved_at = {max(1, round(share * steps)) for share in config.checkpoints}
    paths = []
    for step in range(1, steps + 1):
        rate = config.learning_rate * min(1.0, step / 50) * max(0.1, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = next(order)
        batch = {"tokens": examples.inputs[rows].to(device), "states": examples.states[rows].to(device)}
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if folder is not None and step in saved_at:
            path = folder / f"step-{step:06d}.pt"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
            paths.append(path)
    return model.eval(), paths


@torch.no_grad()
def losses_of(model: LoopedRewriter, task: StepTask, examples: Examples) -> Tensor:
    """Answer loss of every example, in nats: float32 ``(N,)``, on the CPU."""
    loss = answer_loss(task)
    return torch.cat([loss(model, to_model(batch, model)).cpu() for batch in examples.batches(512)])


@torch.no_grad()
def accuracy_of(model: LoopedRewriter, task: StepTask, examples: Examples) -> tuple[float, float]:
    """Share of answer positions, and of whole answers, that are right."""
    place = _answer(task)
    answers = [model(to_model(batch, model)["tokens"]).argmax(-1).cpu() for batch in examples.batches(512)]
    right = torch.cat(answers)[:, place] == examples.states[:, -1, place]
    return float(right.float().mean()), float(right.all(1).float().mean())


def to_model(batch: Batch, model: LoopedRewriter) -> Batch:
    """A batch on the model's device."""
    device = model.position.device
    return {name: value.to(device) for name, value in batch.items()}


def _answer(task: StepTask) -> slice:
    return slice(task.answer_positions.start, task.answer_positions.stop)


def _order(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        shuffled = torch.randperm(count, generator=generator)
        # A short last batch would weigh its examples more.
        yield from (shuffled[i : i + size] for i in range(0, max(1, count - size + 1), size))
