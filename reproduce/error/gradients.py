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
from stepinfluence.attribution.space import Block
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
    # Products in float64: what is compared are sketches, not the rounding of their sums. A query at a time, as the
    # steps of all of them in float64 would take twice the memory of the gradients.
    left = train.double()
    return torch.stack([left @ one.double().T for one in query], 1)


class Pairs:
    """Training gradients beside the step gradients of queries, and what is known of their scores exactly.

    Attributes:
        train: ``(N, D)``.
        query: ``(Q, steps, D)``.
        truth: ``<g, p_t>``, float64 ``(N, Q, steps)``.
        sizes: ``|g| |p_t|``, the same shape.
    """

    def __init__(self, train: Gradients, query: Gradients) -> None:
        self.train, self.query = train, query
        self.truth = scores(train.values, query.values)
        # By parameter: squared norms, (N,) and (Q, steps).
        self._squares = [tuple(_squares(side.of(block), len(block.shape)) for side in (train, query))
                         for block in train.blocks]  # fmt: skip
        whole = [sum(parts) for parts in zip(*self._squares, strict=True)]
        self.sizes = (whole[0][:, None, None] * whole[1]).sqrt()

    def bound(self, m: int, hashing: HashFamily) -> Tensor:
        """What the variance of each score cannot exceed: ``sum_w c_w |g_w|^2 |p_{t,w}|^2``, ``(N, Q, steps)``.

        ``c_w`` is a family's own constant for a parameter's shape (docs/design.md), the lemma's 6/m + 4/m^2 for ``iid``
        matrices.
        """
        total = torch.zeros_like(self.truth)
        for block, (left, right) in zip(self.train.blocks, self._squares, strict=True):
            total += variance_bound(block.shape, m, hashing) * left[:, None, None] * right
        return total

    def sketched(self, m: int, hashing: HashFamily, seed: int) -> Tensor:
        """Scores of sketches, ``(N, Q, steps)``."""
        return scores(sketch(self.train, m, hashing, seed), sketch(self.query, m, hashing, seed))

    def errors(self, m: int, hashing: HashFamily, seeds: Sequence[int]) -> Tensor:
        """Sketched minus exact scores for each seed of the tables: ``(seeds, N, Q, steps)``."""
        return torch.stack([self.sketched(m, hashing, s) - self.truth for s in seeds])


def _squares(values: Tensor, dims: int) -> Tensor:
    """Squared norms over the last ``dims`` dimensions, summed in float64."""
    axes = tuple(range(-dims, 0))
    norm: Tensor = torch.linalg.vector_norm(values, dim=axes, dtype=torch.float64)
    return norm.square()


def rounding(model: LoopedGPT, batch: Batch, gradients: Gradients, m: int, hashing: HashFamily) -> float:
    """Largest difference of ``attach``'s features from sketches of the exact gradients, over each example's norm."""
    capture = stepinfluence.attach(model, body="core", sketch_size=m, hashing=hashing)
    loss = at_depth(gradients.values.shape[1])
    found = capture.featurize([batch], loss, progress=False).values.double()
    wanted = sketch(gradients, m, hashing, 0).double()
    return float(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())
