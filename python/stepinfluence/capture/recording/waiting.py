"""Uses of linear layers that wait, so that one call sketches all of a layer's loop steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdi_kernels import Route, TensorSketch, sketch_linear_grads
from stepinfluence.capture.body.sources import Piece
from stepinfluence.capture.body.targets import Target
from stepinfluence.capture.owners.rows import Use
from stepinfluence.errors import UnsupportedUseError


@dataclass
class Layer:
    """Where and how the gradients of a weight, or of a piece of it, are sketched.

    Attributes:
        piece: of a parameter, a matrix.
        sketch: oriented as the piece is.
        out: ``(B, steps, m)``, or ``(B, 1, m)`` summed over steps.
        by_step: which of the two.
        route: of the kernels.
        metric: one number for each weight, or None.
    """

    piece: Piece
    sketch: TensorSketch
    out: Tensor
    by_step: bool
    route: Route
    metric: Tensor | None


@dataclass
class _Group:
    """The waiting uses of one layer in one precision: in lists, what :func:`sketch_linear_grads` takes."""

    layer: Layer
    activations: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    versions: list[tuple[str, int, int]] = field(default_factory=list)

    def check(self) -> None:
        """Raises UnsupportedUseError where a tensor was changed in place while it waited."""
        for (name, *before), a, g in zip(self.versions, self.activations, self.grads, strict=True):
            if before != [a._version, g._version]:
                raise UnsupportedUseError(
                    f"{name}: {'its gradient' if before[0] == a._version else 'the data it was used on'} was changed "
                    "in place later in the backward pass; pass workspace=0 to attach, so that every use is sketched "
                    "before anything else runs, or change a copy"
                )

    def sketch(self) -> None:
        """Add the sketches of all of them to where they go."""
        self.check()
        layer = self.layer
        if len(self.steps) == 1:
            a, g, row = self.activations[0], self.grads[0], self.rows[0]
            out = layer.out[row : row + len(a), self.steps[0]]
            sketch_linear_grads(a, g, layer.sketch, route=layer.route, metric=layer.metric, out=out)
            return
        sketch_linear_grads(
            self.activations,
            self.grads,
            layer.sketch,
            route=layer.route,
            metric=layer.metric,
            steps=self.steps,
            rows=self.rows,
            out=layer.out,
        )


def stream_of(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream that kernels on a tensor are launched on now; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


class WaitingUses:
    """The uses of one backward pass that wait.

    Each weight has a share of memory. When the next use of a weight would not fit in it beside those that wait, these
    are sketched, in one call for each layer; a use of which not even two would fit does not wait. So what is in a call
    follows from shapes and ``share`` alone, and all that waits is smaller than the shares together. On a GPU a use on
    another stream than the pass was begun on does not wait either.

    Args:
        share: bytes that the waiting uses of one weight may keep alive; memory that they have in common counts once.
        buffer: that sketches are added to, where the pass is begun.
    """

    def __init__(self, share: int, buffer: Tensor) -> None:
        self._share = share
        self._stream = stream_of(buffer)
        self._of: dict[Target, _Waiting] = {}

    def add(self, layer: Layer, use: Use, first: int, activations: Tensor, grads: Tensor) -> None:
        """A use of a layer, ``(n, T, d_in)`` and ``(n, T, d_out)``, of the examples ``first : first + n``.

        Raises:
            UnsupportedUseError: a tensor that waited was changed in place.
        """
        waiting = self._of.setdefault(layer.piece.target, _Waiting())
        needed = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in (activations, grads))}
        if waiting.bytes_with(needed) > self._share:
            waiting.sketch()
        group = waiting.add(layer, needed, activations, grads)
        group.steps.append(use.step if layer.by_step else 0)
        group.rows.append(first)
        group.versions.append((use.name, activations._version, grads._version))
        if 2 * sum(needed.values()) > self._share or stream_of(grads) != self._stream:
            waiting.sketch()

    def sketch(self) -> None:
        """Sketch all that wait."""
        for waiting in self._of.values():
            waiting.sketch()


class _Waiting:
    """The waiting uses of one weight, and the memory that they keep alive: bytes by address."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Piece, torch.dtype], _Group] = {}
        self._held: dict[int, int] = {}

    def bytes_with(self, needed: dict[int, int]) -> int:
        return sum((self._held | needed).values())

    def add(self, layer: Layer, needed: dict[int, int], activations: Tensor, grads: Tensor) -> _Group:
        self._held |= needed
        group = self._groups.setdefault((layer.piece, grads.dtype), _Group(layer))
        group.activations.append(activations)
        group.grads.append(grads)
        return group

    def sketch(self) -> None:
        groups, self._groups, self._held = self._groups, {}, {}
        for group in groups.values():
            group.sketch()
