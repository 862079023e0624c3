"""Which loop step a parameter use belongs to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from stepinfluence.errors import BodyError

Loop: TypeAlias = Literal["entries", "timeline", "manual"]
LOOPS: tuple[str, ...] = get_args(Loop)


def in_backward() -> bool:
    """Whether autograd is running: what the model executes now is a recomputation (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


class StepTracker:
    """Counts loop steps during one forward pass.

    A step is one *entry into the loop body*, not one use of a parameter:

    ``entries``   every body module counts its own entries; its k-th entry is step k. For a body of several modules that
                  are each called once per loop (adapter, blocks), they share the step axis.
    ``timeline``  every entry of any body module starts the next step of one common axis, in the order of
                  execution (nested loops with different cycle lengths; ``labels`` tells which module it was).
    ``manual``    the model's code marks steps with ``with capture.step(t):``.

    An entry while already inside a body module belongs to the inner module's step in ``entries`` mode, and to the
    outer step in ``timeline`` mode.
    """

    def __init__(self, model: nn.Module, body: Sequence[nn.Module], loop: Loop) -> None:
        if loop not in LOOPS:
            raise ValueError(f"loop: got {loop!r}; use one of {', '.join(map(repr, LOOPS))}")
        names = {module: name for name, module in model.named_modules()}
        self.body = list(body)
        self.names = {module: names.get(module, type(module).__name__) for module in self.body}
        self.loop: Loop = loop
        self.reset()

    def reset(self) -> None:
        self._entries: dict[nn.Module, list[int]] = {module: [] for module in self.body}
        self._moments = 0
        self._stack: list[int | None] = []
        self.thread = threading.current_thread()
        self.elsewhere = ""
        """Name of another thread that entered the body, where operations cannot be seen."""
        self.count = 0
        """Number of steps seen so far."""
        self.labels: list[str] = []
        """Name of the module of each step (``timeline`` mode; the first body module's name otherwise)."""

    def entries(self, module: nn.Module) -> Sequence[int]:
        """Moments at which ``module`` was entered, on a clock that ticks at every entry of any body module."""
        return self._entries[module]

    @property
    def current(self) -> int | None:
        """The 0-based step being executed, or None outside the body."""
        return self._stack[-1] if self._stack else None

    def _push(self, step: int, label: str) -> None:
        self._stack.append(step)
        while self.count <= step:
            self.labels.append(label)
            self.count += 1

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        if in_backward():
            return
        if (here := threading.current_thread()) is not self.thread:
            self.elsewhere = here.name
        if self.loop == "timeline":
            step = self._stack[-1] if self._stack and self._stack[-1] is not None else self.count
        else:
            step = len(self._entries[module])
        self._entries[module].append(self._moments)
        self._moments += 1
        self._push(step, self.names[module])

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if not in_backward() and self._stack:  # empty if a hook of the model's failed before the entry
            self._stack.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count body entries within this context; hooks are gone afterwards."""
        handles = []
        if self.loop != "manual":
            for module in self.body:
                # First of its hooks: what the others compute is part of the step.
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def manual_step(self, step: int) -> Iterator[None]:
        """Mark everything executed within this context as loop step ``step`` (0-based)."""
        if self.loop != "manual":
            raise BodyError(f"capture.step: loop={self.loop!r} counts steps itself; attach with loop='manual'")
        if step < 0:
            raise ValueError(f"step: got {step}; loop steps count from 0")
        if in_backward():
            yield
            return
        self._push(step, f"step {step + 1}")
        try:
            yield
        finally:
            self._stack.pop()
