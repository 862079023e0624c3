"""Uses of linear layers that wait, so that one call sketches all of a layer's loop steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sdi_kernels import Route, TensorSketch, sketch_linear_grads
from stepinfluence.capture.rows import Use
from stepinfluence.errors import UnsupportedUseError


@dataclass
class Layer:
    """Where and how the gradients of a weight, or of a piece of it, are sketched.

    Attributes:
        sketch: oriented as the piece is.
        out: ``(B, steps, m)``, or ``(B, 1, m)`` summed over steps.
        route: of the kernels.
        metric: one number for each weight, or None.
    """

    sketch: TensorSketch
    out: Tensor
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


class WaitingUses:
    """The uses of one backward pass that wait.

    When the next would not fit beside those that wait, all of them are sketched, one call for each layer; one that does
    not fit by itself is sketched at once. So what is in a call follows from shapes and ``limit`` alone.

    Args:
        limit: bytes of memory that waiting tensors keep alive; what several share counts once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: dict[object, _Group] = {}
        self._held: dict[int, int] = {}
        self._bytes = 0

    def add(self, key: object, layer: Layer, use: Use, first: int, activations: Tensor, grads: Tensor) -> None:
        """A use of a layer, ``(n, T, d_in)`` and ``(n, T, d_out)``, of the examples ``first : first + n``.

        Args:
            key: of the layer.

        Raises:
            UnsupportedUseError: a tensor that waited was changed in place.
        """
        tensors = activations, grads
        needed = self._needed(tensors)
        if self._bytes + sum(needed.values()) > self._limit:
            self.sketch()
            needed = self._needed(tensors)
        self._held |= needed
        self._bytes += sum(needed.values())
        group = self._groups.setdefault((key, activations.dtype, grads.dtype), _Group(layer))
        group.activations.append(activations)
        group.grads.append(grads)
        group.steps.append(use.step if layer.out.shape[1] > 1 else 0)
        group.rows.append(first)
        group.versions.append((use.name, activations._version, grads._version))
        if self._bytes > self._limit:
            self.sketch()

    def _needed(self, tensors: tuple[Tensor, ...]) -> dict[int, int]:
        """Memory that these would keep alive besides what is kept already: bytes by address."""
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return {place: size for place, size in storages.items() if place not in self._held}

    def sketch(self) -> None:
        """Sketch all that wait."""
        groups, self._groups = self._groups, {}
        self._held, self._bytes = {}, 0
        for group in groups.values():
            group.sketch()
