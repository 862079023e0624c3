"""A curriculum by step profile, against orders that cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import stepinfluence
import torch
from stepinfluence.capture import ExactCapture
from torch import Tensor, nn

from reproduce.arrays import Array
from reproduce.planted.config import Config as Planted
from reproduce.planted.config import make_task
from reproduce.planted.model import LoopedRewriter
from reproduce.planted.planting import Distinct, Examples, clean
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.training import accuracy_of, answer_loss, losses_of, make_model, to_model, train
from reproduce.uses.config import Config

ORDERS = ("everything at once", "random", "by length", "by profile", "by profile, reversed")
FIRST = 0.25
"""Share of the examples that training begins with; it grows to all by the middle of training."""

LOOKS = 10
"""How often the held-out loss is taken, at even distances."""


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Held-out loss in the course of training in several orders, for one seed.

    Returns:
        For each order ``losses`` (``LOOKS`` values of the mean held-out loss of the answer, in nats), ``accuracy``
        (whole answers, at the end); ``agreement``: Spearman correlation of the orders by profile and by length.
    """
    from scipy.stats import spearmanr

    task, of_seed = make_task(config.task, large=config.planted.large), config.of_seed(seed)
    draw = Distinct(task, torch.Generator().manual_seed(seed + 2**35))
    examples, held_out = clean(task, draw(of_seed.examples)), clean(task, draw(of_seed.plain_queries))
    # Weights and batches of another seed: the model that is asked is not the one that is then trained.
    asked, _ = train(task, examples, of_seed, loss=answer_loss(task), seed=seed + 1000)
    profile, length = centre(asked, task, examples), lengths(task, examples)
    shuffled = np.random.default_rng(seed).permutation(len(examples))
    keys = {
        "random": shuffled.astype(float),
        "by length": length + shuffled / len(examples),  # ties at random
        "by profile": profile,
        "by profile, reversed": -profile,
    }
    found: dict[str, Any] = {}
    for order in ORDERS:
        rank = np.argsort(keys[order], kind="stable") if order in keys else None
        found[order] = in_order(task, examples, held_out, of_seed, seed=seed, rank=rank)
    return {**found, "agreement": float(spearmanr(profile, length).statistic)}


def centre(model: LoopedRewriter, task: StepTask, examples: Examples) -> Array:
    """Centre of mass of each example's self-influence over loop steps, regardless of sign: early ones come first."""
    batches = [to_model(b, model) for b in examples.batches(16)]
    features = ExactCapture(model, body=model.body).featurize(batches, answer_loss(task), progress=False)
    size = stepinfluence.self_influence(features).abs().double().cpu().numpy()
    return np.asarray((size * np.arange(1, size.shape[1] + 1)).sum(1) / size.sum(1))


def lengths(task: StepTask, examples: Examples) -> Array:
    """The last step of the algorithm that changes anything."""
    changed = task.changes(examples.states).numpy() > 0
    return np.where(changed.any(1), changed.shape[1] - changed[:, ::-1].argmax(1), 0).astype(float)


def in_order(
    task: StepTask, examples: Examples, held_out: Examples, config: Planted, *, seed: int, rank: Any
) -> dict[str, Any]:
    """Train on a growing share of the examples.

    Args:
        task, examples, held_out: what is learnt and what is asked.
        config: updates, batch, learning rate.
        seed: of weights and batches; all orders of a seed begin with the same model.
        rank: ``(N,)`` rows in the order in which they come in; None: all from the beginning.
    """
    model = make_model(task, config, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator, loss, losses = torch.Generator().manual_seed(seed + 2**32), answer_loss(task), []
    looks = {round(config.train_steps * (k + 1) / LOOKS) for k in range(LOOKS)}
    for step in range(1, config.train_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, step / 50) * max(0.1, 1 - step / config.train_steps)
        rows = pool(len(examples), step / config.train_steps, rank)
        drawn = rows[torch.randint(len(rows), (config.batch_size,), generator=generator)]
        optimizer.zero_grad(set_to_none=True)
        loss(model, {"tokens": examples.inputs[drawn], "states": examples.states[drawn]}).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in looks:
            losses.append(float(losses_of(model, task, held_out).mean()))
    return {"losses": losses, "accuracy": accuracy_of(model.eval(), task, held_out)[1]}


def pool(count: int, progress: float, rank: Any) -> Tensor:
    """Rows that may be drawn after a share of the training: :data:`FIRST` of them at first, all from the middle on."""
    if rank is None:
        return torch.arange(count)
    share = min(1.0, FIRST + (1 - FIRST) * 2 * progress)
    return torch.from_numpy(np.asarray(rank)[: max(1, round(share * count))])
