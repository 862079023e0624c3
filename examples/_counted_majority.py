"""Which of two symbols is more frequent among the first 3, 5, 7 or 9 of nine? A pool of all four, a target of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from stepinfluence.evaluation.problems.counting import LoopedClassifier, loss

BITS, COUNTS = 9, (3, 5, 7, 9)
LEARNT, POOL, TARGET, HELD = 448, 512, 32, 128
WRONG = 16
"""One label of the pool in so many is wrong."""


@dataclass(frozen=True)
class Task:
    """All examples, and which of them are whose.

    Attributes:
        tokens, labels: ``(N, 10)``: nine bits and a token that says how many of them count; ``(N,)``.
        counts: ``(N,)``: how many count.
        learnt: rows that the model has seen: the counts 3, 5 and 7.
        pool: rows to choose from, of all counts; ``wrong``: those of them whose label is not the answer.
        target, held: rows of count 9: those to choose by, and those to measure on.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    learnt: torch.Tensor
    pool: torch.Tensor
    wrong: torch.Tensor
    target: torch.Tensor
    held: torch.Tensor

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[rows], self.labels[rows]


def make_task(seed: int) -> Task:
    every = torch.cartesian_prod(*[torch.arange(2)] * BITS)
    tokens = torch.cat([torch.cat([every, torch.full((len(every), 1), 2 + k)], 1) for k in range(len(COUNTS))])
    labels = torch.cat([(every[:, :count].sum(1) > count // 2).long() for count in COUNTS])
    counts = torch.tensor(COUNTS).repeat_interleave(len(every))
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(tokens)))
    longest = order[counts[order] == COUNTS[-1]]
    target, held = longest[:TARGET], longest[TARGET : TARGET + HELD]
    rest = order[~torch.isin(order, torch.cat([target, held]))]
    learnt, pool = rest[:LEARNT], rest[LEARNT : LEARNT + POOL]
    wrong = pool[torch.from_numpy(rng.permutation(POOL)[: POOL // WRONG])]
    labels[wrong] = 1 - labels[wrong]
    return Task(tokens, labels, counts, learnt[counts[learnt] < COUNTS[-1]], pool, wrong, target, held)


def untrained(seed: int, steps: int = 4) -> LoopedClassifier:
    torch.manual_seed(seed)
    return LoopedClassifier(2 + len(COUNTS), BITS + 1, 2, steps=steps)


def train(model: LoopedClassifier, task: Task, rows: torch.Tensor, updates: int, rate: float) -> LoopedClassifier:
    """Full-batch Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(model, task.batch(rows)).mean().backward()
        optimizer.step()
    return model.eval()


def held_out(model: LoopedClassifier, task: Task) -> tuple[float, float]:
    """Loss and accuracy on the held rows."""
    tokens, labels = task.batch(task.held)
    with torch.no_grad():
        losses, right = loss(model, (tokens, labels)), model(tokens).argmax(1) == labels
    return float(losses.mean()), float(right.float().mean())
