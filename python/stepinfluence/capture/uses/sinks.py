"""What the backward pass of a capture hands gradients to, whatever becomes of them there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from stepinfluence.capture.body.sources import Source
    from stepinfluence.capture.owners.rows import Use


class GradientSink(Protocol):
    """Takes the gradients of one backward pass, use by use: :meth:`TappedPass.backward` runs one into a sink.

    Every method gets the source that was used, the use (its loop step, and whose its rows are), and tensors with the
    rows of the use in their leading dimensions ``*lead``.
    """

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        """Use as a linear map: ``(*lead, d_in), (*lead, d_out)``; gradient ``sum_l grad_l (x) activations_l``."""

    def products(
        self, source: Source, use: Use, x: Tensor, grad: Tensor, counts: tuple[int, int, int], back: Sequence[int]
    ) -> None:
        """Use as a linear map for each index of ``both`` dimensions: ``x`` ``(*lead, *both, *inner)``, ``grad``
        ``(*lead, *both, *outer)``; the gradient is ``(*both, *outer, *inner)``, permuted by ``back`` to the source's.

        ``counts`` are the numbers of dimensions of (both, outer, inner).
        """

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        """Per-token gradients ``(*lead, numel)`` of a source of any shape, usually a vector."""

    def scaled(
        self, source: Source, use: Use, grads: Tensor, factors: Tensor, center: Tensor | None, scale: Tensor
    ) -> None:
        """Gain of a normalisation: gradients ``grads * (factors - center) * scale``; ``(*lead, numel)`` twice, and
        ``(*lead)`` for center and scale."""

    def embedding(self, source: Source, use: Use, ids: Tensor, grad: Tensor, padding: int | None) -> None:
        """Use as a lookup table: ``(*lead), (*lead, d)``."""

    def expanded(self, source: Source, use: Use, grad: Tensor) -> None:
        """Use by broadcasting: ``grad`` is the gradient of the expanded source."""

    def dense_rows(self, source: Source, use: Use, grads: Tensor) -> None:
        """Gradients by row as they are: ``(rows, *source shape)``."""

    def finish(self) -> None:
        """The backward pass is over: whatever waits is dealt with."""
