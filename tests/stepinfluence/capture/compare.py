"""Every model goes through the same comparison: oracle, exact capture, sketches per step and summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
import zoo
from rounding import Rounding, flat, joined, measure
from stepinfluence import Capture, ExactCapture, Features, attach
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]
FLOAT64 = 1e-10
"""Relative tolerance in float64: a hundred thousand times its rounding, for whatever cancels."""


@dataclass
class Result:
    """What the three ways gave; gradients are flattened side by side, ``(N, steps, parameters)``."""

    capture: Capture
    sketches: Features
    exact: Features | None
    gradients: Tensor
    sketch_of_gradients: Tensor
    lengths: list[int] = field(default_factory=list)
    rounding: Rounding | None = None


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of an example's rows (2-norm over steps and columns)."""
    error = (found.double() - expected.double()).flatten(1).norm(dim=1)
    size = expected.double().flatten(1).norm(dim=1)
    return float((error / size.clamp(min=1e-6 * float(size.max()) + 1e-30)).max())


def modules_of(model: nn.Module, body: Sequence[str]) -> list[nn.Module]:
    found = [model.get_submodule(name) for name in body]
    return [m for part in found for m in (part if isinstance(part, nn.ModuleList) else [part])]


def compare(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn = zoo.squared_error,
    *,
    body: Sequence[str] = ("core",),
    loop: str = "entries",
    wrapped: nn.Module | None = None,
    plain: nn.Module | None = None,
    around: Callable[[oracle.Leaves], AbstractContextManager[None]] | None = None,
    whole_batch: Callable[[int], object] | None = None,
    precision: torch.dtype | None = None,
    exact: bool = True,
    sketch_size: int = 64,
    **options: Any,
) -> Result:
    """Run the oracle, ExactCapture and the sketching capture, and hold them against each other.

    In float64 to :data:`FLOAT64`; in less, as accuracy.py has it, with the oracle's rounding (rounding.py).

    Args:
        model: what the body's names refer to; the oracle runs ``plain`` if given, else this one.
        wrapped: what the captures are given instead of ``model``.
        whole_batch: fixes the random state of batch k, see :func:`oracle.step_gradients`.
        precision: what the model computes in, where that is not the dtype of its first body parameter.
    """
    model.eval()
    given = model if wrapped is None else wrapped
    honest = model if plain is None else plain
    parts = modules_of(model, body)
    capture = attach(given, body=parts, sketch_size=sketch_size, loop=loop, **options)
    names = [t.name for t in capture.targets]
    precision = precision or capture.targets[0].parameter.dtype
    if loop == "manual":
        model.mark = capture.step  # type: ignore[assignment]
    sketches = capture.featurize(batches, loss_fn)
    summed = capture.featurize(batches, loss_fn, per_step=False)
    if options.get("training"):
        honest.train()

    def gradients(batch: Any, index: int) -> dict[str, Tensor]:
        return oracle.step_gradients(
            honest,
            batch,
            loss_fn,
            body=modules_of(honest, body),
            names=names,
            loop=loop,
            batch_dim=options.get("batch_dim", 0),
            around=around,
            whole_batch=None if whole_batch is None else (lambda: whole_batch(index)),
        )

    rounding = None
    if precision == torch.float64:
        grads = joined([gradients(batch, k) for k, batch in enumerate(batches)])
    else:
        rounding = measure(honest, batches, gradients, precision)
        grads = rounding.plain
    tables = {t.name: t.sketch for t in capture.targets}
    expected, columns = oracle.sketched(grads, tables), flat(grads)
    if rounding is None:
        assert sketches.values.shape == expected.shape
        assert relative(sketches.values, expected) <= FLOAT64
        assert relative(summed.values, expected.sum(1)) <= FLOAT64
    else:
        rounding.check_sketches(sketches.values, "sketches by step:", tables, per_step=True)
        rounding.check_sketches(summed.values, "summed sketches:", tables, per_step=False)
    assert sketches.lengths is not None
    steps, active = columns.shape[1], (columns != 0).any(-1)
    lengths = (torch.arange(1, steps + 1) * active).amax(1).tolist()
    assert sketches.lengths.tolist() == lengths
    full = None
    if exact:
        kept = {k: v for k, v in options.items() if k in ("outside", "batch_dim", "training", "seed")}
        full = ExactCapture(given, body=parts, loop=loop, **kept).featurize(batches, loss_fn)
        if rounding is None:
            assert relative(full.values, columns) <= FLOAT64
        else:
            rounding.check_gradients(full.values, "exact features:")
        assert full.lengths is not None
        assert full.lengths.tolist() == lengths
    return Result(capture, sketches, full, columns, expected, lengths, rounding)
