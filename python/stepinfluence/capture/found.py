"""Owners found by gradients, for a batch in which they could not be followed.

Gradients know: if example ``b``'s loss is scaled by ``2**e_b``, so is the gradient at each of its rows, exactly (a
power of two changes no digit of a floating-point number), and nobody else's. So the graph is walked once with all
weights one and once for each digit of the example's number, written in a base of distinct powers of two; the ratios at
each row spell its owner. Two numbers and a position are kept of each row in these passes, and nothing is sketched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from stepinfluence.capture.calls import OUTSIDE
from stepinfluence.capture.diagnosis import not_finite, not_proportional
from stepinfluence.capture.interceptor import Interceptor
from stepinfluence.capture.rows import REDUCED, Use
from stepinfluence.capture.sources import Source
from stepinfluence.errors import LayoutError

MAX_EXPONENT = {torch.float16: 3}
"""Largest power of two that a loss is scaled by, where the dtype's range is small; 31 otherwise."""


class _Rows:
    """What the passes so far have told of the rows of one use."""

    def __init__(self, use: Use, rows: Tensor) -> None:
        self.use = use
        self.column = rows.abs().argmax(1, keepdim=True) if rows.shape[1] else None
        self.value, self.norm = self._look(rows)
        self.owners = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self.dtype = torch.float32
        self.last: int | None = None

    def _look(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        norm = rows.norm(dim=1)
        return (norm if self.column is None else rows.gather(1, self.column).squeeze(1)), norm

    def check_proportional(self, rows: Tensor, factor: float) -> None:
        tolerance = 1e-2 if self.dtype in REDUCED else 1e-4
        norm = self._look(rows)[1]
        if not bool(((norm - factor * self.norm).abs() <= tolerance * factor * self.norm).all()):
            raise not_proportional(self.use.name, factor, half=self.dtype == torch.float16)

    def read(self, rows: Tensor, base: int, place: int) -> None:
        """Add the digit of weight ``place`` to the owners."""
        value, norm = self._look(rows)
        empty = self.value == 0
        # Rows without gradient belong to nobody; counted to example 0, they add zero to its features.
        ratio = torch.where(empty, 1.0, value / torch.where(empty, 1.0, self.value))
        digit = ratio.clamp(min=1e-3).log2().round()
        scale = 2**digit
        tolerance = 1e-2 if self.dtype in REDUCED else 1e-4
        same = ((ratio - scale).abs() <= tolerance * scale) & ((norm - scale * self.norm).abs() <= tolerance * norm)
        if not bool(((same | empty) & (digit >= 0) & (digit < base)).all()):
            raise LayoutError(
                f"{self.use.name}: the gradient of a row changes with the losses of other examples of its batch; "
                "say which dimension holds the examples (batch_dim=), use no operation that mixes them (batch "
                "normalisation in training mode), and no hook on a gradient that is not linear"
            )
        self.owners += digit.long() * place


class Scout:
    """Takes the place of a recorder in the passes that find owners."""

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}
        self._digit: tuple[int, int] | None = None
        self._factor: float | None = None
        self._passes = 0

    def passes(self, losses: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """Loss weights ``(B,)`` of the passes; run a backward pass for each while it is current."""
        yield weights
        dtypes = {rows.dtype for rows in self._rows.values()}
        base = 1 + min((MAX_EXPONENT.get(dtype, 31) for dtype in dtypes), default=31)
        numbers = torch.arange(len(losses), device=losses.device)
        place = 1
        while place < len(losses):
            self._digit = base, place
            self._passes += 1
            yield weights * (2.0 ** (numbers // place % base)).to(weights)
            place *= base
        for rows in self._rows.values():
            rows.use.found = rows.owners

    def proportional(self, weights: Tensor) -> Iterator[Tensor]:
        """Loss weights of passes that tell whether gradients are proportional to the losses at all.

        Raises:
            UnsupportedUseError, LossError: they are not (names the parameter).
        """
        for self._factor in (128.0, 1 / 128):
            self._passes += 1
            yield weights * self._factor

    def finish(self) -> None:
        """Nothing waits."""

    def _scout(self, use: Use, grad: Tensor, trailing: int) -> None:
        lead = grad.dim() - trailing
        if grad.is_complex():  # as pairs of numbers
            grad, trailing = torch.view_as_real(grad.resolve_conj()), trailing + 1
            lead = grad.dim() - trailing
        rows = grad.reshape(math.prod(grad.shape[:lead]), math.prod(grad.shape[lead:])).double()
        if self._digit is None and self._factor is None:
            finite = rows.isfinite().all(1)
            if not bool(finite.all()):
                raise not_finite(use.name, int((~finite).sum()), len(rows))
        held = self._rows.get(id(use))
        if held is None:
            held = self._rows[id(use)] = _Rows(use, rows)
            held.dtype = grad.dtype
        elif held.last != self._passes:  # once a pass: other sources have the same rows
            if self._factor is not None:
                held.check_proportional(rows, self._factor)
            elif self._digit is not None:
                held.read(rows, *self._digit)
        held.last = self._passes

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        # Of a parameter used transposed, the gradient comes as the activations: one of the two scales.
        other = activations.norm(dim=-1, keepdim=True)
        self._scout(use, grad * torch.where(other == 0, 1, other), 1)

    def products(
        self, source: Source, use: Use, x: Tensor, grad: Tensor, counts: tuple[int, int, int], back: Sequence[int]
    ) -> None:
        self._scout(use, grad, counts[0] + counts[1])

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        self._scout(use, grads, 1)

    def vector_or_dense(self, source: Source, use: Use, grads: Tensor) -> None:
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
        self._scout(use, grads, grads.dim() - 1)


def owners_of_rows(interceptor: Interceptor, losses: Tensor, *, reduced: bool = False) -> Literal["followed", "found"]:
    """Make the owners of all uses of a forward pass known.

    Args:
        interceptor: after the forward pass that gave ``losses`` ``(B,)``.
        reduced: take one number that is repeated for the loss of the whole batch.

    Returns:
        Whether they had been followed to the losses, or were found by gradients in further backward passes.

    Raises:
        LayoutError: some row belongs to more than one example.
    """
    size = len(losses)
    interceptor.shared.size = size
    if size <= 1:
        return "followed"
    if reduced and losses.stride(0) == 0:  # made of one number out of sight: it proves nothing about the rows
        _check_followed(interceptor)
        return "followed"
    if followed_to(interceptor, losses):
        return "followed"
    scout = Scout()
    ones = torch.ones_like(losses)
    try:
        for weights in scout.passes(losses, ones):
            interceptor.backward(losses, weights, scout, keep=True)
    except LayoutError:
        for weights in scout.proportional(ones):  # another reason, which has another remedy
            interceptor.backward(losses, weights, scout, keep=True)
        raise
    return "found"


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
