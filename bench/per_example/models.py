"""A looped model: who gives what of the per-example gradients of its body, from the same batch.

A contestant gives gradients of the body, ``(batch, P)`` or by loop step ``(batch, steps, P)``, or features that stand
for them, ``(batch, D)`` or ``(batch, steps, D)``. Gradients by step are those at the copies of an unrolled body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import stepinfluence
import torch
from opacus.grad_sample import GradSampleModule
from sdi import ProjectedTracInSDI
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.capture import CASES, Case, Looped, loss_fn, make
from bench.per_example.layers import SKETCH_SIZE
from sdi_kernels import TensorSketch, sketch_matrix_grads, sketch_vector_grads

OURS, OURS_SUMMED = "sdi-kernels, by step", "sdi-kernels, summed"
PLAIN = "plain forward+backward"
PUBLISHED = "published package, by step"
EXACT = "ExactCapture, by step"
SIZES: dict[str, list[Case]] = {
    "batch": [replace(CASES["sudoku"], steps=8, batch=batch) for batch in (1, 4, 16, 64, 256)],
    "steps": [replace(CASES["sudoku"], steps=steps, batch=8) for steps in (2, 8, 32, 128)],
}
"""The Sudoku-like model of docs/design.md, at sizes along each axis."""


def body(model: Looped) -> dict[str, nn.Parameter]:
    """Parameters of the body, as the core names them."""
    return dict(model.core.named_parameters())


def flat(gradients: dict[str, Tensor], lead: int) -> Tensor:
    """Gradients side by side, after ``lead`` leading dimensions."""
    return torch.cat([g.flatten(lead) for g in gradients.values()], dim=lead)


def one_by_one(model: Looped, batch: Tensor) -> Tensor:
    """Plain autograd, each example alone: ``(B, P)``."""
    parameters = list(body(model).values())
    rows = [torch.autograd.grad(loss_fn(model, example).sum(), parameters) for example in batch.split(1)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def _loss_unrolled(model: Looped, copies: list[dict[str, Tensor]], example: Tensor) -> Tensor:
    """The loss of one example, with parameters of its own for each step."""
    tokens = example.unsqueeze(0)
    injected = model.embed(tokens)
    x = injected
    for parameters in copies:
        x = torch.func.functional_call(model.core, parameters, (x + injected,))
    return nn.functional.cross_entropy(model.head(x).transpose(1, 2), tokens)


def _each(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """Gradients by the first argument, for each row of the second."""

    def run(parameters: Any, batch: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # the fused one is run row by row under vmap
            return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)

    return run


def by_func(model: Looped, batch: Tensor) -> Tensor:
    """torch.func, all examples at once: ``(B, P)``."""

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return _loss_unrolled(model, [parameters] * model.steps, example)

    held = {name: p.detach() for name, p in body(model).items()}
    return flat(_each(loss)(held, batch), 1)


def copies_by_func(model: Looped, batch: Tensor) -> list[dict[str, Tensor]]:
    """torch.func on an unrolled body, all examples at once: for each step, parameter -> ``(B, ...)``."""

    def loss(copies: list[dict[str, Tensor]], example: Tensor) -> Tensor:
        return _loss_unrolled(model, copies, example)

    held = [{name: p.detach() for name, p in body(model).items()} for _ in range(model.steps)]
    found: list[dict[str, Tensor]] = _each(loss)(held, batch)
    return found


def steps_by_func(model: Looped, batch: Tensor) -> Tensor:
    """The same: ``(B, steps, P)``."""
    return torch.stack([flat(g, 1) for g in copies_by_func(model, batch)], 1)


def steps_then_sketched(model: Looped, batch: Tensor, capture: stepinfluence.Capture) -> Tensor:
    """The same, each gradient sketched once it is there, with the capture's tables: ``(B, steps, D)``."""
    rows = []
    for at_step in copies_by_func(model, batch):
        blocks = []
        for target in capture.targets:
            gradient = at_step.pop(target.name.removeprefix("core."))
            whole = gradient.flatten(1).unsqueeze(1)  # a sum over one token
            if isinstance(target.sketch, TensorSketch):
                blocks.append(sketch_matrix_grads(gradient, target.sketch))
            else:
                blocks.append(sketch_vector_grads(whole, target.sketch))
        rows.append(torch.cat(blocks, 1))
    return torch.stack(rows, 1)


def by_opacus(model: Looped) -> Callable[[Tensor], Tensor]:
    """Opacus' hooks, ``(B, P)``; the model is wrapped once."""
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")  # its hooks do nothing in eval mode

    def run(batch: Tensor) -> Tensor:
        wrapped.zero_grad()
        loss_fn(wrapped, batch).sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in body(model).values()], 1)

    return run


def contestants(case: Case) -> dict[str, Callable[[], Any]]:
    """Name -> the work on one batch."""
    model, batch = make(case)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=SKETCH_SIZE)
    exact = stepinfluence.ExactCapture(model, body=model.core)
    other = make(case)[0]
    published = ProjectedTracInSDI(model=other, target_modules=other.core, projection_size=SKETCH_SIZE)
    opacus = by_opacus(make(case)[0])

    def plain() -> Tensor:
        model.zero_grad()
        loss = loss_fn(model, batch).sum()
        loss.backward()
        return loss.detach()

    return {
        PLAIN: plain,
        OURS: lambda: capture.featurize([batch], loss_fn, progress=False).values,
        OURS_SUMMED: lambda: capture.featurize([batch], loss_fn, per_step=False, progress=False).values,
        PUBLISHED: lambda: published.featurize_loader(loader=[batch], loss_fn=loss_fn),
        "torch.func, by step, then sketched": lambda: steps_then_sketched(model, batch, capture),
        "torch.func, by step": lambda: steps_by_func(model, batch),
        EXACT: lambda: exact.featurize([batch], loss_fn, progress=False).values,
        "torch.func, summed": lambda: by_func(model, batch),
        "Opacus, summed": lambda: opacus(batch),
        "one example at a time, summed": lambda: one_by_one(model, batch),
    }


def check() -> None:
    """Every contestant on a small model: gradients against plain autograd, sketches against those of full gradients.

    Raises:
        SystemExit: one gives something else.
    """
    small = contestants(Case("check", 16, 2, 1, 3, 5, 4, 7, True, 1.0))
    results = {name: call().detach() for name, call in small.items() if name not in (PLAIN, PUBLISHED)}
    wanted = [results["torch.func, by step, then sketched"], results["torch.func, by step"]]
    for name, got in results.items():
        want = next(w for w in wanted if w.shape[-1] == got.shape[-1])
        want = want if want.dim() == got.dim() else want.sum(1)
        error = float((got - want).norm() / want.norm())
        if not error < 1e-4:
            raise SystemExit(f"{name}: relative error {error:.1e}; a wrong result is not timed")
