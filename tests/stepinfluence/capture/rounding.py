"""What rounding does to the gradients of a model: what torch gets in the model's precision, and what nobody loses.

The oracle's gradients (oracle.py) in three ways: as the model is; on its float64 twin; and on that twin with every
parameter and every input moved by one part in 2^30, up or down at random. Scaled to the spacing of a precision, the
last says how large the terms are that cancel in a gradient: those of an example's loss above all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import torch
from accuracy import Expected
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sdi_kernels import CountSketch, TensorSketch

Gradients = dict[str, Tensor]
Rows = Callable[[Gradients], Tensor]
LOW = (torch.float32, torch.bfloat16, torch.float16)
DRAWS, MOVE = 3, 2.0**-30
EQUATIONS = {"query": "nsd,qtd->nqt", "both": "nsd,qtd->nqst", "none": "nsd,qtd->nq"}


class Wide(TorchFunctionMode):
    """What code asks to have in float32 or less, it gets in float64. Autocast leaves float64 alone by itself."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.bfloat16, Tensor.half):
            return args[0].double()
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if _low(x) else x, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _low(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in LOW


@contextmanager
def in_double(
    model: nn.Module, change: Callable[[Tensor], Tensor] = lambda t: t, values: Sequence[Tensor] | None = None
) -> Iterator[None]:
    """The model itself, not a copy (others hold on to its modules), in float64, its parameters (``values``) changed."""
    parameters = [(p, p.data) for p in model.parameters()]
    given = [data for _, data in parameters] if values is None else values
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    default = torch.get_default_dtype()
    model.double()
    for (parameter, _), value in zip(parameters, given, strict=True):
        parameter.data = change(value.double())
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(default)
        for parameter, data in parameters:
            parameter.data = data
        for module, held in buffers:
            module._buffers.update(held)


class Rounding:
    """Gradients of a set of batches, ``(N, steps, *shape)`` by name, in the three ways.

    Attributes:
        plain, exact: in the precision the model computes in, and in float64.
        eps: spacing of that precision.
    """

    def __init__(self, plain: Gradients, exact: Gradients, eps: float, change: Callable[[], list[Gradients]]) -> None:
        self.plain, self.exact, self.eps = plain, exact, eps
        self._change = functools.cache(change)

    def weighted(self, metric: Mapping[str, Tensor], power: float) -> Rounding:
        """The same for gradients times ``metric ** power``."""

        def times(grads: Gradients) -> Gradients:
            return {n: g.double() * metric[n].double().reshape(g.shape[2:]) ** power for n, g in grads.items()}

        return Rounding(times(self.plain), times(self.exact), self.eps, lambda: [times(c) for c in self._change()])

    def change(self) -> Tensor:
        """By how much each entry of the gradients side by side moves at most, per unit of relative change."""
        return torch.stack([flat(c) for c in self._change()]).abs().amax(0)

    def check_gradients(self, found: Tensor, what: str) -> None:
        """``found``: the gradients side by side, ``(N, steps, parameters)``."""
        self._check(found, what, flat, lambda g: flat(g).abs())

    def check_sketches(
        self, found: Tensor, what: str, sketches: Mapping[str, CountSketch | TensorSketch], *, per_step: bool
    ) -> None:
        """``found``: ``(N, steps, columns)``, or ``(N, columns)`` of the sum over steps."""
        self._check(found, what, *_in_sketches(sketches, per_step=per_step))

    def check_conservation(
        self,
        found: float,
        sketches: Mapping[str, CountSketch | TensorSketch],
        measure: Callable[[Tensor, Tensor], Tensor],
        parts: int = 1,
    ) -> None:
        """``found``: difference between two ways to the sketches of whole gradients, as ``measure`` has it.

        Args:
            measure: of sizes of differences and of sketches, ``(N, parts)`` (see Expected.check_difference).
            parts: how many pieces of equal length a row is measured in.
        """
        rows, terms = (
            lambda grads, make=make: make(grads).unflatten(-1, (parts, -1))
            for make in _in_sketches(sketches, per_step=False)
        )
        first = {name: g[:, :1] for name, g in self.exact.items()}
        expected = self._expected(rows, terms, moved=False)
        if found > expected.explained(measure):
            expected = self._expected(rows, terms, moved=True)
        expected.check_difference(found, measure, expected.exact - rows(first))

    def _check(self, found: Tensor, what: str, rows: Rows, terms: Rows) -> None:
        expected = self._expected(rows, terms, moved=False)
        if expected.excess(found) > 1:  # the same bound with all its terms, which cost three more runs of the oracle
            expected = self._expected(rows, terms, moved=True)
        expected.check(found, what)

    def _expected(self, rows: Rows, terms: Rows, *, moved: bool) -> Expected:
        # Features are float32 or better, whatever the model computes in: so much for adding up the terms themselves.
        features = min(self.eps, torch.finfo(torch.float32).eps) / self.eps
        exact, plain, magnitude = rows(self.exact), rows(self.plain), features * terms(self.exact)
        if moved:
            magnitude = magnitude + torch.stack([rows(c) for c in self._change()]).abs().amax(0)
        return Expected(exact, plain, magnitude, self.eps)


def _in_sketches(sketches: Mapping[str, CountSketch | TensorSketch], *, per_step: bool) -> tuple[Rows, Rows]:
    """What gradients give as sketches, and the magnitudes of what is added up there."""
    unsigned = {name: _unsigned(sketch) for name, sketch in sketches.items()}

    def steps(values: Tensor) -> Tensor:
        return values if per_step else values.sum(1)

    return (
        lambda g: steps(oracle.sketched(g, sketches)),
        lambda g: steps(oracle.sketched({n: v.abs() for n, v in g.items()}, unsigned)),
    )


def check_influence(
    found: Tensor, parts: Sequence[tuple[float, Rounding, Rounding]], what: str, steps: str = "query"
) -> None:
    """Influence against the oracle's: inner products of its gradients, summed over checkpoints.

    Args:
        parts: step size and both sides of each checkpoint.
        steps: whose steps are told apart: ``"query"``, ``"both"`` or ``"none"``.
    """
    equation = EQUATIONS[steps]
    kind = torch.float32 if parts[0][1].eps >= torch.finfo(torch.float32).eps else torch.float64

    def total(one: Callable[[Rounding], Tensor], two: Callable[[Rounding], Tensor] | None = None) -> Tensor:
        return sum(eta * torch.einsum(equation, one(left), (two or one)(right)) for eta, left, right in parts)  # type: ignore[return-value]

    def size(side: Rounding) -> Tensor:
        return flat(side.exact).abs()

    exact, plain = total(lambda r: flat(r.exact)), total(lambda r: flat(r.plain).to(kind))
    expected = Expected(exact, plain, total(size), parts[0][1].eps, rows=False)
    if expected.excess(found) > 1:
        change = total(Rounding.change, size) + total(size, Rounding.change)
        expected = Expected(exact, plain, total(size) + change, parts[0][1].eps, rows=False)
    expected.check(found, what)


def influence_of_sketches(
    left: Rounding, right: Rounding, sketches: Mapping[str, CountSketch | TensorSketch], steps: str = "query"
) -> Expected:
    """What is expected of the inner products of two sides' sketches (for ``steps`` see :func:`check_influence`)."""
    unsigned = {name: _unsigned(sketch) for name, sketch in sketches.items()}
    exact, plain, terms = (
        [oracle.sketched(pick(side), tables) for side in (left, right)]
        for pick, tables in (
            (lambda side: side.exact, sketches),
            (lambda side: side.plain, sketches),
            (lambda side: {n: g.abs() for n, g in side.exact.items()}, unsigned),
        )
    )
    plain = [values.float() for values in plain]
    return Expected(*(torch.einsum(EQUATIONS[steps], *pair) for pair in (exact, plain, terms)), rows=False)


def measure(
    model: nn.Module, batches: Sequence[Any], gradients: Callable[[Any, int], Gradients], precision: torch.dtype
) -> Rounding:
    """Run ``gradients(batch, index)``, the oracle on ``model``, in the three ways; the last when it is asked for.

    Args:
        precision: what the model computes in: its dtype, or that of autocast.
    """

    held = [p.detach().clone() for p in model.parameters()]  # the last runs come later: others may train the model on

    def wide(change: Callable[[Tensor], Tensor]) -> Gradients:
        with in_double(model, change, held):
            return joined([gradients(_changed(batch, change), k) for k, batch in enumerate(batches)])

    def changes() -> list[Gradients]:
        generator = torch.Generator().manual_seed(0)

        def move(values: Tensor) -> Tensor:
            sign = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
            return values * (1 + MOVE * sign)

        return [{n: (g - exact[n]) / MOVE for n, g in wide(move).items()} for _ in range(DRAWS)]

    exact = wide(lambda t: t)
    plain = joined([gradients(batch, k) for k, batch in enumerate(batches)])
    return Rounding(plain, exact, torch.finfo(precision).eps, changes)


def measure_body(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    body: nn.Module,
    names: Sequence[str],
) -> Rounding:
    """:func:`measure` of a body of one module, in the precision of its parameters."""

    def gradients(batch: Any, _: int) -> Gradients:
        return oracle.step_gradients(model, batch, loss_fn, body=[body], names=names)

    return measure(model, batches, gradients, next(body.parameters()).dtype)


def joined(found: Sequence[Gradients]) -> Gradients:
    """Batches one below the other, with zero steps where one ran fewer."""
    steps = max(next(iter(f.values())).shape[1] for f in found)
    return {n: torch.cat([oracle.pad_steps(f[n], steps) for f in found]) for n in found[0]}


def flat(grads: Gradients) -> Tensor:
    return torch.cat([g.reshape(*g.shape[:2], -1).double() for g in grads.values()], -1)


def _changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map(
        lambda t: change(t.double()) if isinstance(t, Tensor) and t.is_floating_point() else t, batch
    )


def _unsigned(sketch: CountSketch | TensorSketch) -> CountSketch | TensorSketch:
    """The same buckets, every sign positive."""
    if isinstance(sketch, CountSketch):
        return CountSketch.from_tables(sketch.bucket, abs(sketch.sign), sketch.m)
    sides = (sketch.out.bucket, abs(sketch.out.sign), sketch.inp.bucket, abs(sketch.inp.sign))
    return TensorSketch.from_tables(*sides, sketch.m)
