"""The CUDA kernels at full size against float64 (the checks are in checks.py; skipped without a CUDA device)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# Loaded by path: tests are no package, and checks.py is a program of its own too.
_spec = importlib.util.spec_from_file_location("sdi_gpu_checks", Path(__file__).parent / "checks.py")
assert _spec is not None
assert _spec.loader is not None
checks = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = checks
_spec.loader.exec_module(checks)

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
routes = pytest.mark.parametrize("route", checks.ROUTES)


@dtypes
@routes
@pytest.mark.parametrize("shape", [*checks.SMALL, *checks.FULL], ids=str)
def test_linear(shape: object, dtype: torch.dtype, route: str) -> None:
    checks.check_linear(shape, dtype, route)


@dtypes
@routes
@pytest.mark.parametrize("index", range(len(checks.random_shapes())))
def test_linear_random_shapes(index: int, dtype: torch.dtype, route: str) -> None:
    print(f"SDI_GPU_SEED={checks.SEED}")
    checks.check_linear(checks.random_shapes()[index], dtype, route)


@routes
def test_linear_one_tf32_product(route: str) -> None:
    torch.set_float32_matmul_precision("high")
    checks.check_linear(checks.FULL[1], torch.float32, route)


@dtypes
@pytest.mark.parametrize("shape", checks.SMALL, ids=str)
def test_integers_are_exact(shape: object, dtype: torch.dtype) -> None:
    checks.check_integers(shape, dtype)


@dtypes
@pytest.mark.parametrize("shape", [*checks.SMALL, *checks.FULL[1:4]], ids=str)
def test_shear(shape: object, dtype: torch.dtype) -> None:
    checks.check_shear(shape, dtype)


@dtypes
@routes
@pytest.mark.parametrize("shape", [*checks.SMALL, checks.FULL[1]], ids=str)
def test_lists_of_steps(shape: object, dtype: torch.dtype, route: str) -> None:
    checks.check_steps(shape, dtype, route)


@dtypes
@pytest.mark.parametrize("shape", [*checks.SMALL, checks.FULL[1]], ids=str)
def test_pairwise(shape: object, dtype: torch.dtype) -> None:
    checks.check_pairwise(shape, dtype)


@routes
def test_strided_slice_accumulates(route: str) -> None:
    checks.check_strided_slice_accumulates(route)


@pytest.mark.parametrize("name", ["check_deterministic", "check_workspace", "check_compile", "check_float64"])
def test_promises(name: str) -> None:
    getattr(checks, name)()
