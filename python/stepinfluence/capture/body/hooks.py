"""Gradient hooks on body parameters (``weight.register_hook(mask)``): read as factors, and applied to every example.

In training a hook sees the gradient of the whole batch, summed over examples and loop steps. Applied to each of these
parts it gives the same sum only if it is linear, and sketches can carry it only if it multiplies every entry by a
fixed number: masks, scales, changes of sign. So a hook is called with a few made-up gradients when a run begins; if it
is such a factor, that becomes a part of the metric, otherwise it is refused. During a run hooks are silent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.attribution.preconditioners import Elementwise, Factored, Root
from stepinfluence.errors import UnsupportedUseError

SCALES = {torch.float16: (1.0, 1e-2, 1e2)}
"""Sizes of made-up gradients, so that what clips is found; 1, 1e-6 and 1e6 in dtypes of a wide range."""

REMEDY = "remove the hook while featurizing, or set requires_grad=False on the parameter"


class Hooks:
    """The hooks on some parameters, during a run."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._parameters = list(parameters)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """No hook is called within this context; afterwards they are as they were."""
        held = [(p._backward_hooks, dict(p._backward_hooks)) for _, p in self._parameters if p._backward_hooks]
        for hooks, _ in held:
            hooks.clear()
        try:
            yield
        finally:
            self.forget_new()
            for hooks, before in held:
                hooks.update(before)

    def refuse_new(self) -> None:
        """Refuse hooks that were put on a parameter during the run.

        Raises:
            UnsupportedUseError: names the parameter.
        """
        for name, parameter in self._parameters:
            if parameter._backward_hooks:
                self.forget_new()
                raise UnsupportedUseError(
                    f"{name}: the forward pass puts a gradient hook on it, which cannot be applied to single "
                    "examples; register the hook once, before featurizing, or multiply within forward()"
                )

    def forget_new(self) -> None:
        """Take off hooks that were put on a parameter during the run."""
        for _, parameter in self._parameters:
            if parameter._backward_hooks:
                parameter._backward_hooks.clear()


def read_factors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What the hooks on parameters multiply each entry of a gradient by, by name; hooks that change nothing are left
    out.

    Raises:
        UnsupportedUseError: a hook that is no fixed factor for each entry, or one on accumulated gradients (names the
            parameter).
    """
    found = {}
    for name, parameter in parameters.items():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedUseError(
                f"{name}: has a post-accumulate-grad hook, which acts on what backward() leaves in .grad and not on "
                f"the gradient of an example; {REMEDY}"
            )
        if parameter._backward_hooks:
            factor = _read(name, parameter)
            if not bool((factor == 1).all()):
                found[name] = factor
    return found


def with_factors(
    roots: Mapping[str, Root], factors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Root]:
    """Roots of a metric with the factors of hooks multiplied in."""
    combined = dict(roots)
    for name, factor in factors.items():
        root = combined.get(name)
        own = factor.to(device, dtype)
        combined[name] = _root(own if root is None else own * root.as_matrix().reshape(factor.shape))
    return combined


def _root(factor: Tensor) -> Root:
    """As an outer product where it is one (whole rows masked, all scaled alike): every route can apply that."""
    if factor.dim() > 1 and factor.numel():
        matrix = factor.flatten(1)
        place = int(matrix.abs().argmax())
        i, j = divmod(place, matrix.shape[1])
        rows, columns = matrix[:, j].clone(), matrix[i] / matrix[i, j]
        if torch.equal(rows[:, None] * columns, matrix):
            return Factored(rows, columns)
    return Elementwise(factor.contiguous())


def _read(name: str, parameter: nn.Parameter) -> Tensor:
    hooks: dict[Any, Any] = parameter._backward_hooks  # type: ignore[assignment]
    before = dict(hooks)

    def through(gradient: Tensor) -> Tensor:
        given = gradient.clone()
        for hook in before.values():
            result = hook(given)
            given = given if result is None else result  # a hook may also write to what it is given
        if not isinstance(given, Tensor) or given.shape != gradient.shape:
            raise TypeError("its result is no gradient of the parameter's shape")
        return given.to(gradient.dtype)

    like = parameter.detach()
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
            problem, factor = _examine(through, like)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UnsupportedUseError(
            f"{name}: its gradient hook fails on a gradient made up to see what it does ({type(error).__name__}: "
            f"{reason}); {REMEDY}"
        ) from error
    finally:
        changed = list(hooks) != list(before)
        hooks.clear()
        hooks.update(before)
    if changed:
        problem = "takes itself off after a call"
    if problem:
        raise UnsupportedUseError(
            f"{name}: its gradient hook {problem}, so what it does to a batch's gradient cannot be told for single "
            f"examples; only fixed factors can (masks, scales); {REMEDY}"
        )
    return factor


def _examine(through: Any, like: Tensor) -> tuple[str, Tensor]:
    """(why hooks are no fixed factor, or nothing; the factor)."""
    ones = torch.ones_like(like)
    factor = through(ones)
    generator = torch.Generator().manual_seed(7)
    tolerance = 32 * torch.finfo(like.dtype).eps
    scales = SCALES.get(like.dtype, (1.0, 1e-6, 1e6))
    probes = [torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) for _ in scales]
    outputs = [through(probe * scale) for probe, scale in zip(probes, scales, strict=True)]
    first = through(probes[0])
    if not torch.equal(through(ones), factor) or not torch.equal(first, outputs[0]):
        return "gives another result when it is called again (random, or it keeps count)", factor
    if not bool(factor.isfinite().all()):
        return "gives values that are not finite", factor
    expected = [factor * probe * scale for probe, scale in zip(probes, scales, strict=True)]
    if all(torch.allclose(o, e, rtol=tolerance, atol=0) for o, e in zip(outputs, expected, strict=True)):
        return "", factor
    grown = [torch.allclose(through(probes[0] * s), first * s, rtol=1e2 * tolerance, atol=1e-9 * s) for s in scales]
    if all(grown):
        return "mixes the entries of the gradient", factor
    return "is not linear (it clips, normalises or adds something)", factor
