"""Exact gradients of every loop step, and sketches of them by any family, size and seed.

Sketches are made of the exact gradients themselves, so that nothing but hashing tells the two apart; that ``attach``
gives the same features is checked by :func:`rounding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import stepinfluence
import torch
from stepinfluence.attribution.features import Block
from stepinfluence.capture import ExactCapture
from stepinfluence.models.gpt import LoopedGPT, gpt_loss
from torch import Tensor, nn

from reproduce.error.training import Batch
from sdi_kernels import (
    CountSketch,
    HashFamily,
    TensorSketch,
    sketch_matrix_grads,
    sketch_vector_grads,
    variance_bound,
)

AT_ONCE = 16
"""Examples in a batch of exact gradients: each is differentiated through the graph of its whole batch."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loop body.

    Attributes:
        values: float32 ``(N, steps, D)``, or ``(N, D)`` summed over steps.
        blocks: which columns are which parameter's.
    """

    values: Tensor
    blocks: tuple[Block, ...]

    def summed(self) -> Gradients:
        """Whole gradients, ``(N, D)``."""
        return replace(self, values=self.values.sum(1))

    def matrices(self, name: str = "") -> Gradients:
        """Of the matrices alone whose name holds ``name``; vectors are few, and mostly sketched without loss."""
        kept = [b for b in self.blocks if len(b.shape) > 1 and name in b.name]
        values, start, blocks = [], 0, []
        for block in kept:
            values.append(self.values[..., block.start : block.stop])
            blocks.append(replace(block, start=start, stop=start + block.stop - block.start))
            start = blocks[-1].stop
        return Gradients(torch.cat(values, -1), tuple(blocks))

    def of(self, block: Block) -> Tensor:
        """The gradients of one parameter, ``(..., *shape)``."""
        shaped: Tensor = self.values[..., block.start : block.stop].unflatten(-1, block.shape)
        return shaped


def at_depth(loops: int | None) -> Callable[[nn.Module, Batch], Tensor]:
    """The language model's loss after so many loop steps; the model's own number for None."""
    return lambda model, batch: gpt_loss(partial(model, steps=loops), batch)


def blocks_of(model: LoopedGPT) -> tuple[Block, ...]:
    """The parameters of the loop body, side by side as in a row of exact gradients."""
    return ExactCapture(model, body="core").space().blocks


def exact(model: LoopedGPT, batch: Batch, *, loops: int | None = None, per_step: bool = True) -> Gradients:
    """Exact gradients of every example's loss, by loop step or summed."""
    count = len(batch["tokens"])
    batches = [{k: v[first : first + AT_ONCE] for k, v in batch.items()} for first in range(0, count, AT_ONCE)]
    features = ExactCapture(model, body="core").featurize(batches, at_depth(loops), per_step=per_step, progress=False)
    return Gradients(features.values, features.space.blocks)


def sketch(gradients: Gradients, m: int, hashing: HashFamily, seed: int) -> Tensor:
    """One independent sketch of ``m`` buckets for each parameter, side by side: ``(..., parameters * m)``."""
    parts = []
    for block in gradients.blocks:
        values = gradients.of(block)
        if len(block.shape) == 1:
            buckets = m if hashing == "iid" else min(m, block.shape[0])  # as attach has it: no more than are filled
            tables = CountSketch(block.shape[0], buckets, seed=seed, name=block.name, hashing=hashing)
            parts.append(sketch_vector_grads(values.unsqueeze(-2), tables))
        else:
            sides = TensorSketch(block.shape[0], block.shape[1], m, seed=seed, name=block.name, hashing=hashing)
            parts.append(sketch_matrix_grads(values, sides))
    return torch.cat(parts, -1)


def scores(train: Tensor, query: Tensor) -> Tensor:
    """``<g, p_t>`` of whole vectors ``(N, D)`` with step vectors ``(Q, steps, D)``: float64 ``(N, Q, steps)``."""
    # Products in float64: what is compared are sketches, not the rounding of their sums.
    flat = train.double() @ query.double().flatten(0, 1).T
    return flat.view(len(train), *query.shape[:2])


def bound(train: Gradients, query: Gradients, m: int, hashing: HashFamily) -> Tensor:
    """What the variance of each score cannot exceed: ``sum_w c_w |g_w|^2 |p_{t,w}|^2``, float64 ``(N, Q, steps)``.

    ``c_w`` is a family's own constant for a parameter's shape (docs/design.md), the lemma's 6/m + 4/m^2 for ``iid``.
    """
    total = torch.zeros(len(train.values), *query.values.shape[:2], dtype=torch.float64)
    for block in train.blocks:
        left, right = (part.of(block).flatten(-len(block.shape)).double().square().sum(-1) for part in (train, query))
        total += variance_bound(block.shape, m, hashing) * left[:, None, None] * right
    return total


def norms(train: Tensor, query: Tensor) -> Tensor:
    """``|g| |p_t|``, float64 ``(N, Q, steps)``."""
    left, right = (side.double().square().sum(-1).sqrt() for side in (train, query))
    return left[:, None, None] * right


def errors(train: Gradients, query: Gradients, m: int, hashing: HashFamily, seeds: Sequence[int]) -> Tensor:
    """Sketched minus exact scores for each seed of the tables: float64 ``(seeds, N, Q, steps)``."""
    truth = scores(train.values, query.values)
    return torch.stack([scores(sketch(train, m, hashing, s), sketch(query, m, hashing, s)) - truth for s in seeds])


def rounding(model: LoopedGPT, batch: Batch, gradients: Gradients, m: int, hashing: HashFamily) -> float:
    """Largest difference of ``attach``'s features from sketches of the exact gradients, over each example's norm."""
    capture = stepinfluence.attach(model, body="core", sketch_size=m, hashing=hashing)
    loss = at_depth(gradients.values.shape[1])
    found = capture.featurize([batch], loss, progress=False).values.double()
    wanted = sketch(gradients, m, hashing, 0).double()
    return float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())
