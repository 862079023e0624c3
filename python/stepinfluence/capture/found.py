"""Owners found by gradients, for a batch in which they could not be followed.

Gradients know: if example ``b``'s loss is scaled by ``2**e_b``, so is the gradient at each of its rows, exactly (a
power of two changes no digit of a floating-point number), and nobody else's. So the graph is walked once for each digit
of the example's number, written in a base of distinct powers of two, and once with all weights one, when the ratios at
each row spell its owner, and the row goes where it belongs. Two numbers and a position are kept of each row until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stepinfluence.capture.body.sources import Source
from stepinfluence.capture.diagnosis import not_finite, not_proportional
from stepinfluence.capture.owners import Owners
from stepinfluence.capture.owners.calls import OUTSIDE
from stepinfluence.capture.owners.rows import REDUCED, Told, Use
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.capture.uses.sinks import GradientSink
from stepinfluence.errors import LayoutError

MAX_EXPONENT = {torch.float16: 3}
"""Largest power of two that a loss is scaled by, where the dtype's range is small; 31 otherwise."""


SAMPLED = 32
"""Entries of a row among which one that is large enough is looked for first."""


def _totals(rows: Tensor) -> Tensor:
    """Sums of absolute values ``(n, d) -> (n,)`` in float64: a power of two scales them exactly."""
    totals = rows.abs().sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).double()
    return totals if bool(totals.isfinite().all()) else rows.double().abs().sum(1)


def _large_column(rows: Tensor, totals: Tensor) -> Tensor:
    """A column for each row ``(n, d) -> (n, 1)`` whose entry is far from rounding to zero: the largest if need be."""
    step = max(1, rows.shape[1] // SAMPLED)
    value, column = rows[:, ::step].abs().max(1, keepdim=True)
    if bool((value.double().squeeze(1) * (1000 * rows.shape[1]) < totals).any()):
        return rows.abs().argmax(1, keepdim=True)
    return column * step


class _Rows:
    """What the passes so far have told of the rows of one use: ``(n, d)``, times a number for each where given."""

    def __init__(self, use: Use, dtype: torch.dtype) -> None:
        self.use, self.dtype = use, dtype
        self._column: Tensor | None = None
        self._digits: list[tuple[int, int, Tensor, Tensor]] = []
        self._norm: Tensor | None = None
        self.last: int | None = None

    def _look(self, rows: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """One entry of each row, always the same one, and the sum over all."""
        norm = _totals(rows)
        if self.last is None and rows.numel():
            self._column = _large_column(rows, norm)
        value = norm if self._column is None else rows.gather(1, self._column).squeeze(1).double()
        if factor is None:
            return value, norm
        # Where one of them is zero, the other one may be the gradient, of a bias that is added to the product.
        alone, number = norm == 0, torch.where(factor == 0, 1, factor)
        return torch.where(alone, factor, value * number), torch.where(alone, factor, norm * number)

    @property
    def tolerance(self) -> float:
        return 1e-2 if self.dtype in REDUCED else 1e-4

    def check_proportional(self, rows: Tensor, factor: Tensor | None, times: float) -> None:
        """After a look with ``times`` 1: whether gradients are as large as the losses are multiplied."""
        norm = self._look(rows, None)[1] if factor is None else self._look(rows, None)[1] * factor
        if self._norm is None:
            self._norm = norm
        elif not bool(((norm - times * self._norm).abs() <= self.tolerance * times * self._norm).all()):
            raise not_proportional(self.use.name, times, half=self.dtype == torch.float16)

    def read(self, rows: Tensor, factor: Tensor | None, base: int, place: int) -> None:
        """Keep what tells the owners' digit of weight ``place``."""
        self._digits.append((base, place, *self._look(rows, factor)))

    def owners(self, rows: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(n,)``, from the rows with all weights one, and which rows belong to nobody.

        Raises:
            LossError: gradients that are not finite.
            LayoutError: rows of more than one example.
        """
        value, norm = self._look(rows, factor)
        finite = norm.isfinite()
        if not bool(finite.all()):
            raise not_finite(self.use.name, int((~finite).sum()), len(rows))
        # Rows without gradient belong to nobody; counted to any example, they add zero to its features.
        empty = value == 0
        found = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for base, place, scaled, scaled_norm in self._digits:
            ratio = torch.where(empty, 1.0, scaled / torch.where(empty, 1.0, value))
            digit = ratio.clamp(min=1e-3).log2().round()
            scale = 2**digit
            same = (ratio - scale).abs() <= self.tolerance * scale
            same &= (scaled_norm - scale * norm).abs() <= self.tolerance * scaled_norm
            if not bool(((same | empty) & (digit >= 0) & (digit < base)).all()):
                raise LayoutError(
                    f"{self.use.name}: the gradient of a row changes with the losses of other examples of its batch; "
                    "say which dimension holds the examples (batch_dim=), use no operation that mixes them (batch "
                    "normalisation in training mode) and no hook on a gradient that is not linear, and keep index "
                    "tensors that are not of the batch as buffers (register_buffer)"
                )
            found += digit.long() * place
        return found, empty


def _arranged(owners: Tensor, empty: Tensor, size: int) -> Tensor:
    """Owners ``(n,)``, where rows that are ``empty`` go to whom their neighbours suggest: if the rows of each of
    ``size`` examples lie together, or in equal distances."""
    rows = len(owners)
    if rows and rows % size == 0:
        numbers = torch.arange(rows, device=owners.device)
        for suggested in (numbers // (rows // size), numbers % size):
            if bool(((owners == suggested) | empty).all()):
                return suggested
    return owners


class Scout:
    """Takes the place of a recorder in the passes that find owners of the rows of a batch of ``size``.

    Args:
        size: examples of the batch.
        base: losses are multiplied by powers of two below ``2**base``.
    """

    def __init__(self, size: int, base: int) -> None:
        self._size, self._base = size, base
        self._rows: dict[tuple[int, int], _Rows] = {}
        self._told: dict[int, tuple[Tensor, Tensor]] = {}
        self._digit: tuple[int, int] | None = None
        self._times: float | None = None
        self._passes = 0
        self._kept: Owners | None = None

    def digits(self, weights: Tensor) -> Iterator[Tensor]:
        """Loss weights ``(B,)`` of the passes before one with ``weights`` itself, which tells the owners."""
        numbers, place = torch.arange(self._size, device=weights.device), 1
        while place < self._size:
            self._digit = self._base, place
            self._passes += 1
            yield weights * (2.0 ** (numbers // place % self._base)).to(weights)
            place *= self._base
        self._digit = None
        self._passes += 1

    def proportional(self, weights: Tensor) -> Iterator[Tensor]:
        """Loss weights of passes that tell whether gradients are proportional to the losses at all.

        Raises:
            UnsupportedUseError, LossError: they are not (names the parameter).
        """
        self._rows.clear()
        for self._times in (1.0, 128.0, 1 / 128):
            self._passes += 1
            yield weights * self._times

    def finish(self) -> None:
        """Nothing waits."""

    def _scout(self, use: Use, grad: Tensor, trailing: int, other: Tensor | None = None, part: int = 0) -> None:
        """Look at gradients ``(*lead, *trailing dims)`` of a use; ``other``, with a row for each, scales with them.

        Args:
            part: tells sources of one use apart whose rows are not the same gradients.
        """
        held = self._rows.setdefault((id(use), part), _Rows(use, grad.dtype))
        if held.last == self._passes:  # once a pass
            return
        lead = grad.dim() - trailing
        if grad.is_complex():  # as pairs of numbers
            grad, trailing = torch.view_as_real(grad.resolve_conj()), trailing + 1
            lead = grad.dim() - trailing
        rows = grad.reshape(math.prod(grad.shape[:lead]), math.prod(grad.shape[lead:]))
        factor: Tensor | None = None
        if other is not None:
            factor = _totals(other.reshape(len(rows), other.shape[-1]))
        if self._times is not None:
            held.check_proportional(rows, factor, self._times)
        elif self._digit is not None:
            held.read(rows, factor, *self._digit)
        else:
            found, empty = held.owners(rows, factor)
            if (before := self._told.get(id(use))) is not None:  # of another source
                found, empty = torch.where(empty, before[0], found), empty & before[1]
            self._told[id(use)] = found, empty
            owners = _arranged(found, empty, self._size)
            if self._kept is None or not torch.equal(self._kept.lo, owners):
                self._kept = Owners(owners.shape, owners, owners)
            use.found = self._kept  # one object for uses in a row that have the same: they are arranged once
        held.last = self._passes

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        # Of a parameter used transposed, the gradient comes as the activations: one of the two scales.
        self._scout(use, grad, 1, activations)

    def products(
        self, source: Source, use: Use, x: Tensor, grad: Tensor, counts: tuple[int, int, int], back: Sequence[int]
    ) -> None:
        self._scout(use, grad, counts[0] + counts[1])

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        self._scout(use, grads, 1)

    def scaled(
        self, source: Source, use: Use, grads: Tensor, factors: Tensor, center: Tensor | None, scale: Tensor
    ) -> None:
        self._scout(use, grads, 1)

    def embedding(self, source: Source, use: Use, ids: Tensor, grad: Tensor, padding: int | None) -> None:
        self._scout(use, grad, 1)

    def expanded(self, source: Source, use: Use, grad: Tensor) -> None:
        arranged, free = use.lead_last(grad, source.tensor.shape)
        self._scout(use, arranged, grad.dim() - len(free))

    def dense_rows(self, source: Source, use: Use, grads: Tensor) -> None:
        self._scout(use, grads, grads.dim() - 1, part=id(source.tensor))


class _Finding:
    """Shows everything to a scout first, and then to the sink that it is meant for."""

    def __init__(self, scout: Scout, sink: GradientSink) -> None:
        self._both = scout, sink

    def __getattr__(self, name: str) -> Callable[..., None]:
        methods = [getattr(one, name) for one in self._both]

        def call(*arguments: Any) -> None:
            for method in methods:
                method(*arguments)

        return call


def how_told(interceptor: Interceptor, losses: Tensor, *, reduced: bool = False) -> Told:
    """How the owners of all uses of a forward pass are known: followed to its ``losses`` ``(B,)``, or to be found by
    gradients in its backward pass (:func:`find`).

    Args:
        reduced: take one number that is repeated for the loss of the whole batch.

    Raises:
        LayoutError: owners were followed, and are not those of the losses.
    """
    size = len(losses)
    interceptor.shared.size = size
    if size <= 1:
        return "followed"
    if reduced and losses.stride(0) == 0:  # made of one number out of sight: it proves nothing about the rows
        _check_followed(interceptor)
        return "followed"
    return "followed" if followed_to(interceptor, losses) else "found"


def find(interceptor: Interceptor, losses: Tensor, sink: GradientSink | None = None) -> None:
    """Find the owners of all uses of a forward pass that gave ``losses`` ``(B,)``, in backward passes that keep the
    graph.

    Args:
        sink: what the last of them hands gradients to, of losses with weight one; each use when its owners are known.

    Raises:
        LossError: gradients that are not finite.
        LayoutError: some row belongs to more than one example.
        UnsupportedUseError: gradients are not proportional to the losses.
    """
    exponent = min((MAX_EXPONENT.get(dtype, 31) for dtype in interceptor.shared.dtypes), default=31)
    scout, ones = Scout(len(losses), 1 + exponent), torch.ones_like(losses)
    try:
        for weights in scout.digits(ones):
            interceptor.backward(losses, weights, scout, keep=True)
        last = scout if sink is None else cast("GradientSink", _Finding(scout, sink))
        interceptor.backward(losses, ones, last, keep=True)
        interceptor.shared.found = True
    except LayoutError:
        for weights in scout.proportional(ones):  # another reason, which has another remedy
            interceptor.backward(losses, weights, scout, keep=True)
        raise


def _check_followed(interceptor: Interceptor) -> None:
    """Every row of every use has one owner.

    Raises:
        LayoutError: some has none, or more than one.
    """
    for use in interceptor.uses:
        if use.step != OUTSIDE and (use.owners is None or bool((use.owners.lo != use.owners.hi).any())):
            raise LayoutError(
                f"{use.name}: cannot be told apart by example where the loss is one number for the batch; return one "
                "loss per example"
            )


def followed_to(interceptor: Interceptor, losses: Tensor) -> bool:
    """Whether what was followed comes out at the losses as it should: each with one owner, none twice.

    Raises:
        LayoutError: losses are those of the batch's examples in another order.
    """
    interceptor.owners.follower.meets(losses)
    owners = interceptor.owners.follower.owners(losses)
    if owners is None or owners.shape != tuple(losses.shape):
        return False
    if any(use.owners is None for use in interceptor.uses if use.step != OUTSIDE):
        return False
    if owners.along == 0:
        return True
    lo, hi = (ends.expand(owners.shape).tolist() for ends in (owners.lo, owners.hi))
    places = {a: k for k, (a, b) in enumerate(zip(lo, hi, strict=True)) if a == b}
    alone = sum(a > b for a, b in zip(lo, hi, strict=True))  # losses that the loop has no part in
    if len(places) + alone < len(losses) or not all(0 <= a < len(losses) for a in places):
        return False
    left = iter(sorted(set(range(len(losses))) - set(places.values())))
    order = [places[a] if a in places else next(left) for a in range(len(losses))]
    if order != sorted(order):
        if interceptor.owners.labelled:
            wrong = next(k for k, a in enumerate(order) if k != a)
            raise LayoutError(
                f"loss_fn: the loss of example {order[wrong]} comes from the rows of example {wrong} of the batch; "
                "return losses in the order of the batch, and exchange nothing between its examples"
            )
        interceptor.shared.relabelled = torch.tensor(order, device=losses.device)
    return True
