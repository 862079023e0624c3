"""From gradients at parameter uses to rows of sketches."""

from __future__ import annotations

import torch
from torch import Tensor

from sdi_kernels import (
    CountSketch,
    TensorSketch,
    sketch_embedding_grads,
    sketch_matrix_grads,
    sketch_scaled_vector_grads,
    sketch_vector_grads,
)
from stepinfluence.attribution.preconditioners import Elementwise, Factored
from stepinfluence.capture.body.sources import Piece, Source
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.owners.rows import Use
from stepinfluence.capture.recording.dense import DenseSink, product_dtype
from stepinfluence.capture.recording.sketching import Sketching
from stepinfluence.capture.recording.waiting import Layer, WaitingUses


class SketchRecorder(DenseSink):
    """Adds the sketches of one backward pass to a buffer ``(B, steps, D)``, or ``(B, D)`` summed over steps.

    Uses of linear layers wait for each other as far as the capture's workspace goes
    (:mod:`stepinfluence.capture.recording.waiting`); gradients of a vector are summed over tokens, and what that gives
    waits for the end; all else is sketched at once.

    Args:
        sketching: of the capture.
        buffer: that sketches are added to.
        wait: False where hooks of the model's own may write to gradients, through ``.data`` even unseen: then nothing
            waits.
    """

    def __init__(self, sketching: Sketching, buffer: Tensor, *, wait: bool = True) -> None:
        super().__init__(buffer.dtype)
        self._sketching, self.buffer = sketching, buffer
        self._waiting = WaitingUses(sketching.share if wait else 0, buffer)
        self._layers: dict[Piece, Layer | None] = {}
        self._totals: dict[Piece, Tensor | None] = {}

    def finish(self) -> None:
        self._waiting.sketch()
        for piece, total in self._totals.items():
            sketch = self._sketching.sketch_of(piece)
            if total is not None and isinstance(sketch, CountSketch):
                g = self._sketching.times_root(piece, total).unsqueeze(2)
                sketch_vector_grads(g, sketch, out=self._columns(piece.target))
        self._totals = {}

    def _columns(self, target: Target) -> Tensor:
        """The columns of a parameter: ``(B, steps, m)``, or ``(B, 1, m)`` summed over steps."""
        rows = self.buffer if self.buffer.dim() == 3 else self.buffer.unsqueeze(1)
        return rows[:, :, self._sketching.columns_of(target)]

    def _layer(self, source: Source) -> Layer | None:
        """How a source is sketched that is used as a linear map; None where it is no matrix, or piece of one."""
        piece = source.piece
        if piece is None or piece.dim != 2:
            return None
        if piece not in self._layers:
            sketch, root = self._sketching.sketch_of(piece), self._sketching.root_of(piece)
            self._layers[piece] = (
                None
                if not isinstance(sketch, TensorSketch)
                else Layer(
                    piece,
                    sketch,
                    out=self._columns(piece.target),
                    by_step=self.buffer.dim() == 3,
                    route=self._sketching.route,
                    metric=root.sqrt if isinstance(root, Elementwise) else None,
                )
            )
        return self._layers[piece]

    def _out(self, target: Target, step: int, first: int, count: int) -> Tensor:
        """Where the gradients of ``count`` examples go, beginning with ``first``."""
        columns, some = self._sketching.columns_of(target), slice(first, first + count)
        return self.buffer[some, step, columns] if self.buffer.dim() == 3 else self.buffer[some, columns]

    def _cast(self, tensor: Tensor) -> Tensor:
        """Kernels take any floating dtype up to the buffer's; only float64 has to be brought in line."""
        double = self.dtype == torch.float64 or tensor.dtype in (torch.float64, torch.complex128)
        return tensor.to(product_dtype(tensor, self.dtype)) if double else tensor

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        layer = self._layer(source)
        if layer is None:
            super().linear(source, use, activations, grad)
            return
        # The product the model computed used activations in its own precision (autocast).
        a, first = use.rows(self._cast(activations.to(grad.dtype)))
        g, _ = use.rows(self._cast(grad))
        root = self._sketching.root_of(layer.piece)
        if isinstance(root, Factored):
            a, g = a * root.columns, g * root.rows
        if g.numel():
            self._waiting.add(layer, use, first, a, g)

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        piece, sketch = source.piece, self._vector_sketch(source)
        if piece is None or sketch is None:
            super().vector(source, use, grads)
            return
        g, first = use.rows(grads)
        total = self._total(piece, sketch)
        if total is not None:
            total[first : first + len(g), use.step if self.buffer.dim() == 3 else 0] += g.sum(1, dtype=self.dtype)
            return
        g = self._sketching.times_root(piece, self._cast(g))
        sketch_vector_grads(g, sketch, out=self._out(piece.target, use.step, first, len(g)))

    def _total(self, piece: Piece, sketch: CountSketch) -> Tensor | None:
        """Where the gradients of a vector, summed over tokens, wait: ``(B, steps, d)``, or ``(B, 1, d)`` summed over
        steps; None where that would be more than its columns of the feature rows."""
        if piece not in self._totals:
            shape = (len(self.buffer), self.buffer.shape[1] if self.buffer.dim() == 3 else 1, sketch.d)
            own = self._sketching.layout == "concat" and piece.whole and sketch.d <= sketch.m
            self._totals[piece] = self.buffer.new_zeros(shape) if own else None
        return self._totals[piece]

    def scaled(
        self, source: Source, use: Use, grads: Tensor, factors: Tensor, center: Tensor | None, scale: Tensor
    ) -> None:
        piece, sketch = source.piece, self._vector_sketch(source)
        if piece is None or sketch is None:
            super().scaled(source, use, grads, factors, center, scale)
            return
        (g, first), (x, _) = (use.rows(self._cast(t)) for t in (grads, factors))
        g = self._sketching.times_root(piece, g)
        mean, rstd = (None if t is None else use.rows(t, trailing=0)[0] for t in (center, scale))
        out = self._out(piece.target, use.step, first, len(g))
        sketch_scaled_vector_grads(g, x, sketch, center=mean, scale=rstd, out=out)

    def _vector_sketch(self, source: Source) -> CountSketch | None:
        """The sketch of a 1-D source that is a piece of a vector."""
        sketch = self._sketching.sketch_of(source.piece) if source.tensor.dim() == 1 else None
        return sketch if isinstance(sketch, CountSketch) else None

    def embedding(self, source: Source, use: Use, ids: Tensor, grad: Tensor, padding: int | None) -> None:
        piece, table = source.piece, source.tensor
        sketch = self._sketching.sketch_of(piece)
        if piece is None or not isinstance(sketch, TensorSketch) or not _is_table(piece, table):
            super().embedding(source, use, ids, grad, padding)
            return
        g, first = use.rows(self._cast(grad))
        index, _ = use.rows(ids, trailing=0)
        if padding is not None:
            g = g * (index != padding).unsqueeze(-1)
        several = sketch.d_out // len(table)
        if several > 1:  # an entry of the table, as the matrix of an expert, is so many rows
            index = (index.unsqueeze(-1) * several + torch.arange(several, device=index.device)).flatten(1)
            g = g.unflatten(-1, (several, sketch.d_in)).flatten(1, 2)
        if (root := self._sketching.root_of(piece)) is not None:
            g = g * root.at_rows(index)
        sketch_embedding_grads(index, g, sketch, out=self._out(piece.target, use.step, first, len(g)))

    def add(self, piece: Piece, step: int, matrices: Tensor, first: int) -> None:
        sketch = self._sketching.sketch_of(piece)
        out = self._out(piece.target, step, first, len(matrices))
        matrices = matrices.to(out.dtype)
        root = self._sketching.root_of(piece)
        metric = None if root is None else root.as_matrix()
        if isinstance(sketch, TensorSketch):
            sketch_matrix_grads(matrices, sketch, metric=metric, out=out)
        else:
            assert isinstance(sketch, CountSketch)
            matrices = matrices if metric is None else matrices * metric
            sketch_vector_grads(matrices.flatten(1).unsqueeze(1), sketch, out=out)


def _is_table(piece: Piece, tensor: Tensor) -> bool:
    """Whether the entries of a tensor along its first dimension are one row of a piece each, or as many each."""
    if piece.dim == 2:
        return True
    return tensor.is_contiguous() and not piece.transposed and len(piece.rows) % len(tensor) == 0
