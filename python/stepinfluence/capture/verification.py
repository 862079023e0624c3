"""Whether features are per example: a batch is run again with every loss weighted by a power of two of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepinfluence.capture import diagnosis, session
from stepinfluence.capture.passes import TappedModel, TappedPass
from stepinfluence.capture.recording.recorder import SketchRecorder
from stepinfluence.capture.recording.sketching import Sketching


@dataclass(frozen=True)
class Verification:
    """The means to run one batch again.

    Attributes:
        tapped, sketching: what features are made with.
        batch, loss_fn, index: as for :meth:`TappedModel.forward`.
        reduced: as there.
    """

    tapped: TappedModel
    sketching: Sketching
    batch: Any
    loss_fn: session.LossFn
    index: int
    reduced: bool

    def check(self, features: Tensor, ids: Sequence[Hashable], before: Tensor) -> None:
        """Scale every example's loss by its own power of two: its features must scale with it, and with no other.

        This is what "per-example" means, so it finds a mistaken example dimension as well as a model in which
        examples of a batch influence one another.

        Args:
            features: of the batch, ``(B, steps, D)`` or ``(B, D)``.
            ids: of its examples.
            before: the losses that ``features`` belong to, ``(B,)``.

        Raises:
            LossError, LayoutError, UnsupportedUseError: they do not scale; says which parameter, which example and why.
        """
        size = len(features)
        generator = torch.Generator().manual_seed(size)
        # Eight different weights, far apart, and exact products in every floating dtype.
        exponents = torch.randperm(size, generator=generator) % 8 * (7 // max(1, min(size, 8) - 1))
        again = self._forward(ids)
        losses = again.losses.detach()
        if not torch.allclose(losses, before, rtol=1e-2, atol=1e-3 * float(before.abs().amax())):
            raise diagnosis.other_losses(lambda: self.tapped.plain(self.batch, self.loss_fn, self.index))
        scaled, coarse = self._sketched(again, (2.0**exponents).to(losses), features)
        del again
        # Exact but for the rounding of sums that are not taken in the same order twice.
        tolerance = 1e-2 if coarse else 1e-4
        factor = (2.0**exponents).to(features).view(-1, *(1,) * (features.dim() - 1))
        for block in self.sketching.column_groups:
            columns = slice(block.start, block.stop)
            expected = features[..., columns] * factor
            error = (scaled[..., columns] - expected).flatten(1).norm(dim=1)
            size_of = expected.flatten(1).norm(dim=1)
            bad = (~(error <= tolerance * size_of + 1e-6 * size_of.max())).nonzero().flatten()  # a NaN is bad
            if not len(bad):
                continue
            finite = scaled[..., columns].flatten(1).isfinite().all(1)
            if not bool(finite.all()):
                example = repr(ids[int((~finite).nonzero()[0])])
                raise diagnosis.not_finite_again(block.name, example, float(factor.max()))
            half = any(t.parameter.dtype == torch.float16 for t in self.tapped.targets)
            half = half or losses.dtype == torch.float16
            example, one = repr(ids[int(bad[0])]), features[..., columns]

            def alike(factor: float, columns: slice = columns) -> Tensor:
                more = self._forward(None)
                return self._sketched(more, torch.full_like(more.losses, factor), features)[0][..., columns]

            raise diagnosis.not_per_example(block.name, example, alike, one, tolerance, half=half)

    def _forward(self, ids: Sequence[Hashable] | None) -> TappedPass:
        return self.tapped.forward(self.batch, self.loss_fn, ids, self.index, reduced=self.reduced)

    def _sketched(self, run: TappedPass, weights: Tensor, like: Tensor) -> tuple[Tensor, bool]:
        """Features of the losses weighted by ``(B,)``, and whether some gradients were of reduced precision."""
        scaled = torch.zeros_like(like)
        coarse = run.backward(SketchRecorder(self.sketching, scaled, wait=not run.hooked), weights)
        self.tapped.sharding.add_up(scaled, self.sketching.blocks)
        return scaled, coarse
