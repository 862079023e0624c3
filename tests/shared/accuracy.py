"""How accurate a result in floating point has to be: nearly as accurate as plain torch, on whatever CPU this is.

A tolerance relative to the result is no bound: terms cancel, and what is left of their rounding depends on the order in
which a CPU adds them up. So the bound is made of what is known of the *input*:

    |found - exact|  <=  8 |plain - exact|  +  4 eps * magnitude         (2-norms of rows, or entry by entry)

``exact`` is the result in float64, ``plain`` what plain torch gives in the precision of the code under test,
``magnitude`` the result with every term replaced by its absolute value, eps the spacing of that precision at 1. Where
torch is exact by luck, the second part carries the comparison.

A bound that is too wide to notice a mistake would go unnoticed itself. So every :meth:`Expected.check` also asks
whether it would have failed for the exact result with the sign of each row's largest entry swapped, and with every row
shifted by one column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TIMES_TORCH, TIMES_EPS = 8, 4


@dataclass(frozen=True)
class Expected:
    """What a result is held against.

    Attributes:
        exact: in float64.
        plain: by plain torch, in the precision of the code under test.
        magnitude: sums of the terms' absolute values.
        eps: spacing of that precision at 1.
        rows: whether the last dimension is measured as a whole, as rounding spreads over it (a Fourier transform); else
            every entry on its own.
    """

    exact: Tensor
    plain: Tensor
    magnitude: Tensor
    eps: float = torch.finfo(torch.float32).eps
    rows: bool = True
    allowed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert self.exact.dtype == torch.float64
        assert self.exact.shape == self.plain.shape == self.magnitude.shape
        torchs = self._size(self.plain.double() - self.exact)
        allowed = TIMES_TORCH * torchs + TIMES_EPS * self.eps * self._size(self.magnitude.double())
        object.__setattr__(self, "allowed", allowed)

    def excess(self, found: Tensor) -> float:
        """Largest error in units of what is allowed: up to 1 is accurate. NaN is infinitely wrong."""
        assert found.shape == self.exact.shape, f"shape {tuple(found.shape)}, not {tuple(self.exact.shape)}"
        units = self._units(found.detach())
        return float(units.nan_to_num(torch.inf, torch.inf).max()) if units.numel() else 0.0

    def check(self, found: Tensor, what: object = "") -> None:
        """Assert that ``found`` is accurate, and that a wrong result would not have been."""
        excess = self.excess(found)
        assert excess <= 1, f"{what} error is {excess:.3g} times what is allowed".strip()
        for name, mutate in MUTATIONS.items():
            assert self.notices(mutate(self.exact)), f"{what} cannot fail: {name} goes unnoticed".strip()

    def check_difference(self, found: float, measure: Callable[[Tensor, Tensor], Tensor], wrong: Tensor) -> None:
        """Assert that two ways to this result are no further apart than both may be from it.

        Args:
            found: how far apart they are: ``measure`` of sizes of differences and sizes of the result.
            wrong: the result as a mistake would make it, which has to be further away.
        """
        limit = self.explained(measure)
        assert found <= limit, f"the difference is {found:.3g}, where rounding explains {limit:.3g}"
        mistake = float(measure(self._size(wrong - self.exact), self._size(self.exact)))
        assert mistake > limit, f"cannot fail: a mistake makes a difference of {mistake:.3g}, allowed is {limit:.3g}"

    def explained(self, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
        """How far apart rounding may put two ways to this result, see :meth:`check_difference`."""
        return float(measure(2 * self.allowed, self._size(self.exact)))

    def notices(self, wrong: Tensor) -> bool:
        """Whether at least half of what differs in ``wrong`` is found to be wrong."""
        units = self._units(wrong)
        differs = units > 0
        return bool((units > 1)[differs].double().mean() >= 0.5) if differs.any() else True

    def _size(self, values: Tensor) -> Tensor:
        return values.norm(dim=-1) if self.rows else values.abs()

    def _units(self, found: Tensor) -> Tensor:
        error = self._size(found.double() - self.exact)
        return torch.where(error == 0, 0.0, error / self.allowed)


def largest_negated(values: Tensor) -> Tensor:
    """Every row with the sign of its largest entry swapped."""
    if not values.numel():
        return values
    place = values.abs().argmax(-1, keepdim=True)
    return values.scatter(-1, place, -values.gather(-1, place))


def shifted(values: Tensor) -> Tensor:
    """Every row shifted by one column."""
    return values.roll(1, -1)


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"a swapped sign": largest_negated, "a shift by one": shifted}


def multilinear(fn: Callable[..., Tensor], *inputs: Tensor, exact: Tensor | None = None, rows: bool = True) -> Expected:
    """What is expected of ``fn(*inputs)``: plain torch whose terms are products of one entry of each of some inputs.

    It gives the terms' absolute values for absolute inputs, so it must have no signs of its own.

    Args:
        inputs: in float32 or a lower precision (which is converted first: products and sums are float32).
        exact: the float64 result by another definition; else that of ``fn``.
        rows: see :class:`Expected`.
    """
    wide = [x.detach().double() for x in inputs]
    return Expected(
        fn(*wide) if exact is None else exact.detach(),
        fn(*(x.detach().float() for x in inputs)),
        fn(*(x.abs() for x in wide)),
        rows=rows,
    )


def inner_products(equation: str, *factors: Tensor, scale: float = 1.0) -> Expected:
    """What is expected of an ``einsum``: every entry is a sum of its own that may cancel."""
    return multilinear(lambda *x: scale * torch.einsum(equation, *x), *factors, rows=False)
