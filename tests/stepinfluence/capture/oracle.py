"""The third opinion: micro-batches of one, one parameter leaf per loop step, plain autograd.

Shares no code with the captures. An example is run on its own, so nothing can mix examples up; each loop step computes
with leaves of its own, so autograd itself tells the steps apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sdi_kernels import CountSketch, TensorSketch, reference


class Leaves:
    """Gives every loop step its own copy of some parameters."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        held = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {name: held[name] for name in names}
        self.steps: list[dict[str, nn.Parameter]] = []
        self._owners = [
            (module, key, name)
            for name, parameter in self.parameters.items()
            for module in model.modules()
            for key, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if value is parameter
        ]

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """The model computes with the leaves of ``step`` within this context."""
        while len(self.steps) <= step:
            self.steps.append({n: nn.Parameter(p.detach().clone()) for n, p in self.parameters.items()})
        before = [getattr(module, key) for module, key, _ in self._owners]
        for module, key, name in self._owners:
            setattr(module, key, self.steps[step][name])
        try:
            yield
        finally:
            for (module, key, _), value in zip(self._owners, before, strict=True):
                setattr(module, key, value)

    @contextmanager
    def entries(self, body: Sequence[nn.Module], loop: str) -> Iterator[None]:
        """Every call of a body module is a step: of that module's count, or of a common one (``"timeline"``)."""
        counts: dict[Any, int] = {}
        depth = 0

        def entering(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def entered(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                key = module if loop == "entries" else None
                if loop == "timeline" and depth:
                    return forward(*args, **kwargs)
                step = counts.get(key, 0)
                counts[key] = step + 1
                depth += 1
                with self.at(step):
                    result = forward(*args, **kwargs)
                depth -= 1
                return result

            return entered

        for module in body:
            module.forward = entering(module, module.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in body:
                del module.forward

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        """``(steps, *shape)`` for each parameter; zero where the loss does not depend on a step."""
        leaves = [p for step in self.steps for p in step.values()]
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
            for p, g in zip(leaves, found, strict=True)
        ]
        size = len(self.parameters)
        return {n: torch.stack(dense[k::size]) for k, n in enumerate(self.parameters)}


def one_example(batch: Any, index: int, dim: int = 0) -> Any:
    """Example ``index`` of a batch, as a batch of one."""
    return pytree.tree_map(
        lambda t: t.narrow(dim if t.dim() > dim else 0, index, 1) if isinstance(t, Tensor) and t.dim() else t, batch
    )


def step_gradients(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    body: Sequence[nn.Module],
    names: Sequence[str],
    loop: str = "entries",
    batch_dim: int = 0,
    around: Callable[[Leaves], Any] | None = None,
    whole_batch: Callable[[], object] | None = None,
) -> dict[str, Tensor]:
    """Per-example, per-step gradients ``(B, steps, *shape)`` of each named parameter.

    Args:
        around: context to run the forward pass in, instead of counting the entries of ``body``.
        whole_batch: called before the forward pass to fix the random state; then the batch is run as one (a random
            mask depends on the batch's shape) and each example's loss is differentiated on its own.
    """

    def leaves_of(part: Any) -> tuple[Leaves, Tensor]:
        leaves = Leaves(model, names)
        with around(leaves) if around is not None else leaves.entries(body, loop):
            losses = loss_fn(model, part)
        return leaves, losses

    examples: list[dict[str, Tensor]] = []
    if whole_batch is not None:
        whole_batch()
        leaves, losses = leaves_of(batch)
        examples = [leaves.grads(loss) for loss in losses]
    else:
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > batch_dim]
        for index in range(tensors[0].shape[batch_dim]):
            leaves, losses = leaves_of(one_example(batch, index, batch_dim))
            assert losses.shape == (1,)
            examples.append(leaves.grads(losses[0]))
    steps = max(len(grads) for example in examples for grads in example.values())  # alone, one may stop earlier
    return {name: torch.cat([pad_steps(example[name][None], steps) for example in examples]) for name in names}


def pad_steps(values: Tensor, steps: int) -> Tensor:
    """``(B, s, ...)`` with zero steps appended up to ``steps``."""
    missing = torch.zeros(len(values), steps - values.shape[1], *values.shape[2:], dtype=values.dtype)
    return torch.cat([values, missing], 1)


def sketched(grads: Mapping[str, Tensor], sketches: Mapping[str, CountSketch | TensorSketch]) -> Tensor:
    """Sketch of gradients from the definitions, blocks side by side: ``(B, steps, D)`` float64."""
    blocks = []
    for name, sketch in sketches.items():
        grad = grads[name].double()
        if isinstance(sketch, CountSketch):
            blocks.append(reference.count_sketch(grad.reshape(*grad.shape[:2], -1), sketch))
        else:
            blocks.append(reference.tensor_sketch(grad.reshape(*grad.shape[:2], sketch.d_out, sketch.d_in), sketch))
    return torch.cat(blocks, -1)
