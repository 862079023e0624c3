"""From gradients at parameter uses to rows of sketches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sdi_kernels import (
    CountSketch,
    Route,
    TensorSketch,
    sketch_embedding_grads,
    sketch_linear_grads,
    sketch_matrix_grads,
    sketch_scaled_vector_grads,
    sketch_vector_grads,
)
from stepinfluence.attribution.features import Block
from stepinfluence.attribution.preconditioners import Elementwise, Factored, Root
from stepinfluence.capture.rows import Use
from stepinfluence.capture.sources import Piece, Source, pull_back
from stepinfluence.capture.targets import Layout, Target

PULL_BACK_BYTES = 64 << 20
"""Workspace of one taking-back of per-example gradients through a function of parameters (chunked over examples)."""


def product_dtype(grads: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype gradients are added up for features of ``dtype``: complex ones stay complex. They are those of
    complex functions of real parameters, and become real on the way back to these."""
    return torch.promote_types(grads.dtype, dtype) if grads.is_complex() else dtype


def make_blocks(targets: Sequence[Target], layout: Layout) -> list[Block]:
    """Columns of each parameter, in the model's order.

    ``concat``: ``m`` columns of its own for each (paper, section 3). ``sum``: the same M columns for all, into which
    their independent sketches add up.
    """
    blocks, start = [], 0
    for target in targets:
        stop = start + target.sketch.m
        blocks.append(Block(target.name, tuple(target.parameter.shape), start, stop))
        start = stop if layout == "concat" else 0
    return blocks


class SketchRecorder:
    """Adds the sketches of captured gradients to a buffer ``(B, steps, D)``, or ``(B, D)`` summed over steps."""

    def __init__(self, targets: Sequence[Target], route: Route, layout: Layout = "concat") -> None:
        self.blocks = make_blocks(targets, layout)
        self._columns = {id(t): slice(b.start, b.stop) for t, b in zip(targets, self.blocks, strict=True)}
        self._route: Route = route
        self._sketches: dict[Piece, CountSketch | TensorSketch | None] = {}
        self.precondition({})

    def precondition(self, roots: Mapping[str, Root]) -> None:
        """Multiply the gradients by these from now on, by name of the target; targets without one stay as they are.

        Raises:
            ValueError: an elementwise root of a matrix under ``route="fft"``, which never has single entries.
        """
        elementwise = [b.name for b in self.blocks if len(b.shape) > 1 and isinstance(roots.get(b.name), Elementwise)]
        if elementwise and self._route == "fft":
            raise ValueError(
                f"route: got 'fft', which cannot apply the elementwise preconditioner (or gradient hook) of "
                f"{elementwise[0]}; "
                "use 'auto' or 'direct'"
            )
        self._roots = roots
        self._root_parts: dict[Piece, Root] = {}

    def _root(self, piece: Piece) -> Root | None:
        """What the gradient of a piece is multiplied by, oriented as the piece is."""
        root = self._roots.get(piece.target.name)
        if root is None:
            return None
        if piece not in self._root_parts:
            self._root_parts[piece] = root.part(piece.rows, piece.columns, piece.transposed)
        return self._root_parts[piece]

    def _times_root(self, piece: Piece, grads: Tensor) -> Tensor:
        """Gradients ``(..., d)`` of a piece of a vector, multiplied by its root."""
        root = self._root(piece)
        return grads if root is None else grads * root.as_matrix().flatten()

    @property
    def width(self) -> int:
        """D, the length of a feature row."""
        return self.blocks[-1].stop

    def start(self, buffer: Tensor) -> None:
        """Direct what is captured from now on into ``buffer``."""
        self._buffer = buffer

    def _out(self, target: Target, step: int, first: int, count: int) -> Tensor:
        """Where the gradients of ``count`` examples go, beginning with ``first``."""
        columns, some = self._columns[id(target)], slice(first, first + count)
        return self._buffer[some, step, columns] if self._buffer.dim() == 3 else self._buffer[some, columns]

    def _sketch(self, piece: Piece) -> CountSketch | TensorSketch | None:
        if piece.whole:
            return piece.target.sketch
        if piece not in self._sketches:
            self._sketches[piece] = piece.vector_sketch() or piece.matrix_sketch()
        return self._sketches[piece]

    def _cast(self, tensor: Tensor) -> Tensor:
        """Kernels take any floating dtype up to the buffer's; only float64 has to be brought in line."""
        double = self._buffer.dtype == torch.float64 or tensor.dtype in (torch.float64, torch.complex128)
        return tensor.to(product_dtype(tensor, self._buffer.dtype)) if double else tensor

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        """Use as a linear map: ``(*lead, d_in), (*lead, d_out)``; gradient ``sum_l grad_l (x) activations_l``."""
        # The product the model computed used activations in its own precision (autocast).
        a, first = use.rows(self._cast(activations.to(grad.dtype)))
        g, _ = use.rows(self._cast(grad))
        sketch = self._sketch(source.piece) if source.piece is not None and source.piece.dim == 2 else None
        if source.piece is not None and isinstance(sketch, TensorSketch):
            root, out = self._root(source.piece), self._out(source.piece.target, use.step, first, len(g))
            if isinstance(root, Factored):
                a, g = a * root.columns, g * root.rows
            metric = root.sqrt if isinstance(root, Elementwise) else None
            sketch_linear_grads(a, g, sketch, route=self._route, metric=metric, out=out)
            return
        size = max(1, PULL_BACK_BYTES // max(1, 4 * a.shape[-1] * g.shape[-1]))
        dtype = product_dtype(g, self._buffer.dtype)
        for k in range(0, len(a), size):
            outer = torch.bmm(g[k : k + size].to(dtype).transpose(1, 2), a[k : k + size].to(dtype))
            self._dense(source, use, outer.reshape(len(outer), *source.tensor.shape), first + k)

    def products(
        self, source: Source, use: Use, x: Tensor, grad: Tensor, counts: tuple[int, int, int], back: Sequence[int]
    ) -> None:
        """Use as a linear map for each index of ``both`` dimensions: ``x`` ``(*lead, *both, *inner)``, ``grad``
        ``(*lead, *both, *outer)``; the gradient is ``(*both, *outer, *inner)``, permuted by ``back`` to the source's.

        ``counts`` are the numbers of dimensions of (both, outer, inner).
        """
        both, outer, inner = counts
        x, first = use.rows(x.to(grad.dtype), both + inner)
        g, _ = use.rows(grad, both + outer)
        sizes = (*g.shape[2:], *x.shape[2 + both :])
        x = x.flatten(2 + both) if inner else x.unsqueeze(-1)
        g = g.flatten(2 + both) if outer else g.unsqueeze(-1)
        if both:  # (n, L, *both, d) -> (n, both, L, d)
            x, g = (t.flatten(2, 1 + both).transpose(1, 2) for t in (x, g))
        dtype = torch.promote_types(g.dtype, torch.float32)
        size = max(1, PULL_BACK_BYTES // max(1, 4 * source.tensor.numel()))
        for k in range(0, len(g), size):
            found = g[k : k + size].to(dtype).transpose(-1, -2) @ x[k : k + size].to(dtype)
            found = found.reshape(len(found), *sizes).permute(0, *(1 + d for d in back))
            self._dense(source, use, found.reshape(len(found), *source.tensor.shape), first + k)

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        """Use of a 1-D source, with per-token gradients ``(*lead, d)``."""
        g, first = use.rows(grads)
        sketch = self._sketch(source.piece) if source.piece is not None else None
        if source.piece is not None and isinstance(sketch, CountSketch):
            g = self._times_root(source.piece, self._cast(g))
            sketch_vector_grads(g, sketch, out=self._out(source.piece.target, use.step, first, len(g)))
            return
        total = g.sum(1, dtype=product_dtype(g, self._buffer.dtype))
        self._dense(source, use, total.reshape(len(total), *source.tensor.shape), first)

    def scaled(
        self, source: Source, use: Use, grads: Tensor, factors: Tensor, center: Tensor | None, scale: Tensor
    ) -> None:
        """Gain of a normalisation: gradients ``grads * (factors - center) * scale``; ``(*lead, numel)`` twice, and
        ``(*lead)`` for center and scale."""
        sketch = self._sketch(source.piece) if source.piece is not None and source.tensor.dim() == 1 else None
        if source.piece is None or not isinstance(sketch, CountSketch):
            values = factors if center is None else factors - center.unsqueeze(-1)
            self.vector_or_dense(source, use, grads * values * scale.unsqueeze(-1))
            return
        (g, first), (x, _) = (use.rows(self._cast(t)) for t in (grads, factors))
        g = self._times_root(source.piece, g)
        mean, rstd = (None if t is None else use.rows(t, trailing=0)[0] for t in (center, scale))
        out = self._out(source.piece.target, use.step, first, len(g))
        sketch_scaled_vector_grads(g, x, sketch, center=mean, scale=rstd, out=out)

    def vector_or_dense(self, source: Source, use: Use, grads: Tensor) -> None:
        """Per-token gradients ``(*lead, numel)`` of a source of any shape."""
        if source.tensor.dim() == 1:
            self.vector(source, use, grads)
            return
        g, first = use.rows(grads)
        total = g.sum(1, dtype=product_dtype(g, self._buffer.dtype))
        self._dense(source, use, total.reshape(len(total), *source.tensor.shape), first)

    def expanded(self, source: Source, use: Use, grad: Tensor) -> None:
        """Use by broadcasting: ``grad`` is the gradient of the expanded source."""
        self._dense(source, use, *use.reduce_to(grad, source.tensor.shape))

    def embedding(self, source: Source, use: Use, ids: Tensor, grad: Tensor, padding: int | None) -> None:
        """Use as a lookup table: ``(*lead), (*lead, d)``."""
        g, first = use.rows(self._cast(grad))
        index, _ = use.rows(ids, trailing=0)
        if padding is not None:
            g = g * (index != padding).unsqueeze(-1)
        sketch = self._sketch(source.piece) if source.piece is not None else None
        if (
            source.piece is not None
            and isinstance(sketch, TensorSketch)
            and (source.tensor.dim() == 2 or source.piece.whole)
        ):
            if (root := self._root(source.piece)) is not None:
                g = g * root.at_rows(index)
            sketch_embedding_grads(index, g, sketch, out=self._out(source.piece.target, use.step, first, len(g)))
            return
        vocabulary = len(source.tensor)
        size = max(1, PULL_BACK_BYTES // max(1, 4 * vocabulary * g.shape[-1]))
        for k in range(0, len(g), size):
            one_hot = F.one_hot(index[k : k + size], vocabulary).to(product_dtype(g, self._buffer.dtype))
            table = torch.bmm(one_hot.transpose(1, 2), g[k : k + size].to(one_hot.dtype))
            self._dense(source, use, table.reshape(len(table), *source.tensor.shape), first + k)

    def dense_rows(self, source: Source, use: Use, grads: Tensor) -> None:
        """Gradients by row as they are: ``(rows, *source shape)``."""
        rows, first = use.rows(grads, trailing=grads.dim() - 1)
        total = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1, dtype=product_dtype(rows, self._buffer.dtype))
        self._dense(source, use, total, first)

    def _dense(self, source: Source, use: Use, grads: Tensor, first: int = 0) -> None:
        """Per-example gradients as they are: ``(n, *source shape)``, of examples ``first : first + n``."""
        if source.piece is not None:
            shape = (len(source.piece.rows), len(source.piece.columns))
            if source.piece.transposed:
                shape = (shape[1], shape[0])
            self._add(source.piece, use.step, grads.reshape(len(grads), *shape), first)
            return
        size = max(1, PULL_BACK_BYTES // max(1, 4 * sum(t.parameter.numel() for t in source.targets)))
        for k in range(0, len(grads), size):
            for target, found in pull_back(source, grads[k : k + size]):
                rows, columns = target.matrix_shape
                whole = Piece(target, range(rows), range(columns), False, 2)
                self._add(whole, use.step, found.reshape(len(found), rows, columns), first + k)

    def _add(self, piece: Piece, step: int, matrices: Tensor, first: int) -> None:
        sketch = self._sketch(piece)
        out = self._out(piece.target, step, first, len(matrices))
        matrices = matrices.to(out.dtype)
        root = self._root(piece)
        metric = None if root is None else root.as_matrix()
        if isinstance(sketch, TensorSketch) and matrices.device.type == "cpu":
            # Row by row, as a lookup of every row once: the compiled kernel, which there is none of for whole matrices.
            rows = torch.arange(matrices.shape[1]).expand(matrices.shape[:2])
            sketch_embedding_grads(rows, matrices if metric is None else matrices * metric, sketch, out=out)
        elif isinstance(sketch, TensorSketch):
            sketch_matrix_grads(matrices, sketch, metric=metric, out=out)
        else:
            assert isinstance(sketch, CountSketch)
            matrices = matrices if metric is None else matrices * metric
            sketch_vector_grads(matrices.flatten(1).unsqueeze(1), sketch, out=out)
