"""Kernels under Triton's interpreter: ``TRITON_INTERPRET=1 python -m pytest tests/triton_interpret``.

The setting is read when a kernel is imported, so these tests have a process of their own; anywhere else they are
skipped. Launchers are called directly with CPU tensors (the operators would send those to the CPU routes).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if "triton_interpret" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs Triton and TRITON_INTERPRET=1"))


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        """Bounds of loops are arrays of one element, which numpy no longer takes for a number (Triton 3.7 knows it)."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_tensor_for_numpy


@pytest.fixture
def cut_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of fp32 in tf32 as tensor cores form them: the low 13 bits of both operands are cut off.

    Of three products, Triton rounds the operands itself, so those stay as they are.
    """
    exact = interpreter.InterpreterBuilder.create_dot

    def cut(handle: Any) -> Any:
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.int32) & np.int32(-0x2000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = cut(a), cut(b)
        return exact(self, a, b, d, precision, imprecise)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a seed: from then on the programs of a launch run in an order drawn with it."""
    builder = interpreter.InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    orders: list[tuple[tuple[int, ...], Any]] = []

    def shuffle(seed: int) -> None:
        rng = np.random.default_rng(seed)

        def draw(self: Any, *grid: int) -> None:
            orders[:] = [(grid, rng.permutation(int(np.prod(grid))))]
            set_dim(self, *grid)

        def place(self: Any, *index: int) -> None:
            grid, order = orders[0]
            at = order[np.ravel_multi_index(index, grid)]
            set_index(self, *(int(i) for i in np.unravel_index(at, grid)))

        monkeypatch.setattr(builder, "set_grid_dim", draw)
        monkeypatch.setattr(builder, "set_grid_idx", place)

    return shuffle


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on, one for each launch."""
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)
    return names
