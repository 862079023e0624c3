"""``SDI_KERNELS_CPU``: which variant of the compiled kernels a process runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdi_kernels.cpu import native


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = native.instruction_set()
    yield
    if before is not None:
        native.set_instruction_set(before)


def opened() -> object:
    """The library as a process that just started has it: the variable is read when it is opened."""
    return native.library.__wrapped__()


@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_the_variable_picks_the_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("the CPU kernels are not built here, or switched off")
    runs = native.set_instruction_set(name)
    native.set_instruction_set("baseline")
    monkeypatch.setenv(native.VARIABLE, name)
    if runs:
        assert opened() is not None
        assert native.instruction_set() == name
    else:
        with pytest.raises(ValueError, match=f"{native.VARIABLE}: got '{name}', which this machine has not"):
            opened()


def test_none_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "none")
    assert opened() is None


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(ValueError, match=f"{native.VARIABLE}: got 'sse9'; use one of avx512, avx2, baseline or none"):
        opened()
