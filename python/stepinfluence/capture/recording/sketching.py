"""What the sketches of a body's parameters are, under which metric, and which columns of a feature row they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdi_kernels import CountSketch, Route, TensorSketch
from stepinfluence.attribution.preconditioners import Elementwise, Root
from stepinfluence.attribution.space import Block
from stepinfluence.capture.body.sources import Piece
from stepinfluence.capture.body.targets import Layout, Target

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""What ``attach(workspace=None)`` stands for, by device type. On a CPU calls of small layers are worth saving, of
larger ones not (docs/capture.md); on a GPU, where every use would be a launch of its own, of all."""


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


def _in_rows_and_columns(root: Root, target: Target) -> Root:
    """A root for the matrix that a target is sketched as."""
    shape = target.matrix_shape
    if target.parameter.dim() < 3 or shape[0] == target.parameter.shape[0]:
        return root
    return Elementwise(root.as_matrix().reshape(shape))


class Sketching:
    """How a capture sketches, the same for all batches until the metric is changed.

    Attributes:
        blocks: the columns of each parameter.
        route: kernel route of linear layers.
        layout: ``"concat"`` or ``"sum"``.
        workspace: bytes that uses of linear layers may keep alive while they wait to be sketched together.
        share: what each weight has of it.
        roots: what gradients are multiplied by, by name of the target, in its rows and columns.
        probe: a few columns of each block that mostly hold something, ascending: a cheap first look at whether the
            gradient of a step is zero.
    """

    def __init__(self, targets: Sequence[Target], route: Route, layout: Layout, workspace: int | None) -> None:
        self._targets = targets
        device = targets[0].parameter.device
        if workspace is None:
            workspace = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
        if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 0:
            raise ValueError(f"workspace: got {workspace!r}; give a number of bytes, 0 to sketch every use at once")
        self.workspace = workspace
        self.share = workspace // max(1, sum(isinstance(t.sketch, TensorSketch) for t in targets))
        self.blocks = make_blocks(targets, layout)
        self.route: Route = route
        self.layout: Layout = layout
        self._columns = {id(t): slice(b.start, b.stop) for t, b in zip(targets, self.blocks, strict=True)}
        self._sketches: dict[Piece, CountSketch | TensorSketch | None] = {}
        self.probe = self._probe_columns(targets)
        self.precondition({})

    def _probe_columns(self, targets: Sequence[Target]) -> Tensor:
        columns = []
        for target, block in zip(targets, self.blocks, strict=True):
            sketch = target.sketch
            side = sketch.bucket if isinstance(sketch, CountSketch) else range(sketch.m)
            columns += [block.start + int(side[k]) for k in range(min(8, len(side)))]
        return torch.tensor(sorted(set(columns)), device=targets[0].parameter.device)

    def precondition(self, roots: Mapping[str, Root]) -> None:
        """Multiply the gradients by these from now on, by name of the target; targets without one stay as they are.

        Raises:
            ValueError: an elementwise root of a matrix under ``route="fft"``, which never has single entries.
        """
        roots = {t.name: _in_rows_and_columns(roots[t.name], t) for t in self._targets if t.name in roots}
        elementwise = [b.name for b in self.blocks if len(b.shape) > 1 and isinstance(roots.get(b.name), Elementwise)]
        if elementwise and self.route == "fft":
            raise ValueError(
                f"route: got 'fft', which cannot apply the elementwise preconditioner (or gradient hook) of "
                f"{elementwise[0]}; "
                "use 'auto' or 'direct'"
            )
        self.roots = roots
        self._root_parts: dict[Piece, Root] = {}

    @property
    def width(self) -> int:
        """D, the length of a feature row."""
        return self.blocks[-1].stop

    @property
    def column_groups(self) -> list[Block]:
        """The blocks, one for each range of columns: in the sum layout, the last stands for all."""
        return list({block.start: block for block in self.blocks}.values())

    def columns_of(self, target: Target) -> slice:
        """The columns of a feature row that the sketch of a parameter fills."""
        return self._columns[id(target)]

    def root_of(self, piece: Piece) -> Root | None:
        """What the gradient of a piece is multiplied by, oriented as the piece is."""
        root = self.roots.get(piece.target.name)
        if root is None:
            return None
        if piece not in self._root_parts:
            self._root_parts[piece] = root.part(piece.rows, piece.columns, piece.transposed)
        return self._root_parts[piece]

    def times_root(self, piece: Piece, grads: Tensor) -> Tensor:
        """Gradients ``(..., d)`` of a piece of a vector, multiplied by its root."""
        root = self.root_of(piece)
        return grads if root is None else grads * root.as_matrix().flatten()

    def sketch_of(self, piece: Piece | None) -> CountSketch | TensorSketch | None:
        """The sketch of a piece, oriented as it is; None where a source is no piece of a parameter."""
        if piece is None:
            return None
        if piece.whole:
            return piece.target.sketch
        if piece not in self._sketches:
            self._sketches[piece] = piece.vector_sketch() or piece.matrix_sketch()
        return self._sketches[piece]

    def lengths(self, rows: Tensor) -> Tensor:
        """Number of steps up to the last with a gradient, for each example of rows ``(B, steps, D)``: ``(B,)``."""
        active = (rows[:, :, self.probe] != 0).any(-1)
        # Dead units or tokens that do not occur leave the probed columns empty: then all columns decide.
        active[~active] = (rows[~active] != 0).any(-1)
        last = torch.arange(1, rows.shape[1] + 1, device=rows.device) * active
        return last.amax(1).cpu() if rows.shape[1] else torch.zeros(len(rows), dtype=torch.int64)
