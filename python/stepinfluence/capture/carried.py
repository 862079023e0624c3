"""For :class:`~stepinfluence.ExactCapture`: what is computed from body parameters alone and used in another step.

A use of a parameter is where it meets the data, and belongs to the step in which that happens. A tensor that no
example had a part in (weight norm taken once before the loop, a weight cached in the first step, an initial state that
is a parameter) is no use yet. Where such a tensor meets the data in another step than the one it was computed in, a
leaf takes its place, and the leaf's gradient is taken back to the parameters as that step's.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepinfluence.capture.body.sources import TensorSet, base_of, tensors_in
from stepinfluence.capture.body.steps import StepTracker
from stepinfluence.capture.owners.calls import EXPANSIONS, OF_FIRST, OUTSIDE, STRUCTURE_FACTORIES, changes_in_place
from stepinfluence.capture.owners.rows import gains_examples

SEVERAL = -2
"""In place of a step: computed from what belongs to several."""


class Carried(TorchFunctionMode):
    """Around one forward pass.

    Args:
        steps: counts the loop steps of this pass.
        size: examples of the batch; None: not known, then every tensor made without others may be of examples.
        dims: dimensions in which such a tensor may hold the examples.

    Attributes:
        used: (the tensor, the step it was used in, the leaf that took its place).
    """

    def __init__(self, model: nn.Module, steps: StepTracker, size: int | None, dims: tuple[int, ...]) -> None:
        super().__init__()
        self._steps, self._size, self._dims = steps, size, dims
        self._step_of: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._constants = TensorSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._constants.add(tensor)
        self._leaves: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    @property
    def used(self) -> list[tuple[Tensor, int, Tensor]]:
        return list(self._leaves.values())

    def note(self, tensor: Tensor, step: int) -> None:
        """A body parameter, or a tensor computed from body parameters alone, of this step."""
        key, known = id(tensor), self._step_of
        known[key] = (weakref.ref(tensor, lambda _: known.pop(key, None)), step)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        steps, data, count = [], False, 0
        for tensor in tensors_in(args[:1] if func in OF_FIRST else (args, kwargs)):
            count += 1
            if (held := self._step_of.get(id(tensor))) is not None:
                steps.append(held[1])
            elif not self._constants.has_id(id(tensor)):
                data = True
        if data or self._gives_examples(func, args, count):
            if any(step != self._current for step in steps) and not changes_in_place(func, kwargs):
                args, kwargs = self._replaced(args), self._replaced(kwargs)
            result = func(*args, **kwargs)
            if changes_in_place(func, kwargs):
                self._forget(kwargs["out"] if kwargs.get("out") is not None else args[0])
            return result
        result = func(*args, **kwargs)
        step = next(iter(steps), OUTSIDE)
        step = step if all(s == step for s in steps) else SEVERAL
        if steps and changes_in_place(func, kwargs):
            self._written(kwargs["out"] if kwargs.get("out") is not None else args[0], step)
            return result
        for value in tensors_in(result):
            if id(value) in self._step_of:
                continue
            if steps and value.requires_grad:
                self.note(value, step)
            elif count or func in STRUCTURE_FACTORIES or not self._has_size(value):
                self._constants.add(value)
        return result

    @property
    def _current(self) -> int:
        return OUTSIDE if self._steps.current is None else self._steps.current

    def _has_size(self, tensor: Tensor) -> bool:
        if self._size is None:
            return tensor.dim() > 0
        return any(tensor.dim() > k and tensor.shape[k] == self._size for k in self._dims)

    def _gives_examples(self, func: Any, args: tuple[Any, ...], count: int) -> bool:
        """Whether a call gives a tensor that nobody has a part in a row for each example."""
        if func not in EXPANSIONS or count != 1 or not args:
            return False
        if self._size is None or id(args[0]) not in self._step_of:
            return False
        with torch._C.DisableTorchFunction(), torch.no_grad():
            shape = func(args[0].detach(), *args[1:]).shape
        dims = (*self._dims, *range(max(1, len(shape) - 1)))
        return gains_examples(args[0].shape, shape, self._size, dims) is not None

    def _replaced(self, value: Any) -> Any:
        """Arguments with leaves in place of what belongs to another step than the present one."""
        if isinstance(value, dict):
            return {k: self._replaced(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return (tuple if isinstance(value, tuple) else list)(self._replaced(v) for v in value)
        held = self._step_of.get(id(value)) if isinstance(value, Tensor) and torch.is_grad_enabled() else None
        if held is None or held[1] == self._current or not value.requires_grad:
            return value
        key = id(value), self._current
        if key not in self._leaves:
            self._leaves[key] = value, self._current, value.detach().requires_grad_()
        return self._leaves[key][2]

    def _forget(self, tensor: Tensor) -> None:
        """Data was written to a tensor: it, and what shares its memory, is data from now on."""
        self._constants.discard_sharing(tensor)
        for other in self._sharing(tensor):
            self._step_of.pop(id(other), None)

    def _written(self, tensor: Tensor, step: int) -> None:
        """A tensor, and what shares its memory, depends on parameters as used in ``step`` from now on."""
        for other in self._sharing(tensor):
            if self._step_of[id(other)][1] != step:
                self.note(other, SEVERAL)
        shared = [t for t in self._constants.held() if base_of(t) is base_of(tensor)]
        self._constants.discard_sharing(tensor)
        for other in (*shared, tensor):
            if id(other) not in self._step_of:
                self.note(other, step)

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        held = [t for ref, _ in list(self._step_of.values()) if (t := ref()) is not None]
        return [t for t in held if base_of(t) is base_of(tensor)]
