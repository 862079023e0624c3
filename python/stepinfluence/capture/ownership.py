"""Which example each row belongs to, where no shape tells: mixture-of-experts routing, packed sequences.

After ``x[index]`` the rows of an activation belong to whatever examples the data chose. Gradients know: if example
``b``'s loss is scaled by ``2**e_b``, so is the gradient at each of its rows, exactly (a power of two changes no digit
of a floating-point number), and nobody else's. So the graph is walked once with all weights one and once for each
digit of the example's number, written in a base of distinct powers of two; the ratios at each row spell its owner.
Only one number a row is kept from these scouting passes, and nothing is sketched in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stepinfluence.capture.taps import Receive
from stepinfluence.errors import LayoutError

MAX_EXPONENT = {torch.float16: 3}
"""Largest power of two that a loss is scaled by, where the dtype's range is small; 31 otherwise."""


class OwnedUse:
    """One use of a parameter on rows of unknown owners, in one forward pass."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owners: Tensor | None = None
        self._peak: tuple[Tensor, Tensor] | None = None
        self.dtype = torch.float32

    def scout(self, grad: Tensor, base: int, place: int | None) -> None:
        """Read the digit of weight ``place`` off the rows' gradients; None: the pass in which all weights are one."""
        if grad.is_complex():
            grad = torch.view_as_real(grad.resolve_conj()).flatten(-2)
        lead = _row_dims(grad)
        rows = grad.reshape(math.prod(grad.shape[:lead]), math.prod(grad.shape[lead:])).double()
        if place is None or self._peak is None:
            column = rows.abs().argmax(1, keepdim=True)
            self._peak = column, rows.gather(1, column).squeeze(1)
            self.owners = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            self.dtype = grad.dtype
            return
        column, value = self._peak
        # Rows without gradient belong to nobody; counted to example 0, they add zero to its features.
        ratio = torch.where(value == 0, 1.0, rows.gather(1, column).squeeze(1) / torch.where(value == 0, 1.0, value))
        digit = ratio.clamp(min=1e-3).log2().round()
        if not bool(((ratio - 2**digit).abs() <= 1e-2 * 2**digit).all() & (digit >= 0).all() & (digit < base).all()):
            raise LayoutError(
                f"{self.name}: used on rows picked by the data, and some row's gradient is no single example's; "
                "examples must not influence one another"
            )
        assert self.owners is not None
        self.owners += digit.long() * place

    def arrange(self, tensor: Tensor, batch_size: int, lead: int) -> Tensor:
        """Rows grouped by owner, padded with zeros: ``(*rows, *tail) -> (batch_size, most rows of an owner, *tail)``.

        ``lead`` is the number of dimensions that count rows.
        """
        assert self.owners is not None
        flat = tensor.reshape(len(self.owners), *tensor.shape[lead:])
        order = torch.argsort(self.owners, stable=True)
        counts = torch.bincount(self.owners, minlength=batch_size)
        first = counts.cumsum(0) - counts
        owner = self.owners[order]
        out = flat.new_zeros(batch_size, int(counts.max()) if len(flat) else 0, *flat.shape[1:])
        out[owner, torch.arange(len(order), device=order.device) - first[owner]] = flat[order]
        return out


def _row_dims(grad: Tensor) -> int:
    """How many leading dimensions of a gradient count rows: all but the features, at least one."""
    return max(1, grad.dim() - 1)


class Ownership:
    """The uses with unknown owners of one forward pass, and how their gradients are received."""

    def __init__(self) -> None:
        self.uses: list[OwnedUse] = []
        self._pass: tuple[int, int | None] | None = None
        self._batch_size = 0

    @property
    def scouting(self) -> bool:
        """Whether this is a pass in which nothing is recorded."""
        return self._pass is not None

    def owned(self, name: str, receive: Receive, *, examples_first: bool) -> Receive:
        """``receive`` for rows whose owners are to be found: called with tensors ``(B, rows, ...)``."""
        use = OwnedUse(name)
        self.uses.append(use)

        def received(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
            if self._pass is not None:
                use.scout(grad, *self._pass)
                return
            lead = _row_dims(grad)
            if any(t.shape[:lead] != grad.shape[:lead] for t in saved):
                raise LayoutError(f"{name}: used on rows picked by the data, in a way that mixes them; use F.linear")
            arranged = [use.arrange(t, self._batch_size, lead) for t in (grad, *saved)]
            if not examples_first:
                arranged = [t.transpose(0, 1) for t in arranged]
            receive(arranged[0], tuple(arranged[1:]))

        return received

    def scouts(self, losses: Tensor) -> Iterator[Tensor]:
        """Loss weights ``(B,)`` of the scouting passes; run a backward pass for each while it is current."""
        self._batch_size = len(losses)
        if not self.uses:
            return
        self._pass = (1, None)
        yield torch.ones_like(losses)
        base = 1 + min(MAX_EXPONENT.get(use.dtype, 31) for use in self.uses)
        numbers = torch.arange(len(losses), device=losses.device)
        place = 1
        while place < len(losses):
            self._pass = (base, place)
            yield (2.0 ** (numbers // place % base)).to(losses)
            place *= base
        self._pass = None
