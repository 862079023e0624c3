"""What the kernel tests share: the variants of the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdi_kernels.cpu import native


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every variant of the compiled kernels that this machine can run."""
    before = native.instruction_set()
    if before is None:
        pytest.skip("the CPU kernels are not built here, or switched off")
    if not native.set_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_instruction_set(before)
