"""Every module can be the first one that is imported, and what a store holds is told without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import made
import pytest
from stepinfluence.app.runs.scores import SCORES, write_scores

LAZY = (
    "stepinfluence",
    "stepinfluence.app.runs",
    "stepinfluence.attribution.curvature",
    "stepinfluence.store",
)
"""Packages whose names are imported at first use."""

COMMAND = """
import sys
from stepinfluence.app.cli import main

try:
    main()
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("module", ["attribution.preconditioners", "store", "app.runs"])
def test_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import stepinfluence.{module}"], check=True, timeout=120)


def test_importing_the_kernels_registers_their_operators() -> None:
    """Whatever is imported first: exported programs are loaded by what is registered."""
    code = "import sdi_kernels, torch; torch.ops.sdi_kernels.linear_sketch_.default"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("command", [("info",), ("info", "--json"), ("verify",)])
def test_what_a_store_holds_is_told_without_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    train = made.store(tmp_path / "train", [made.features(made.normal(9, made.WIDTH))], dtype="int8", failed=[2])
    query = made.store(tmp_path / "query", [made.features(made.normal(2, 3, made.WIDTH))], dtype="bf16")
    write_scores(train, query, tmp_path / SCORES, parameters=None, device=None, progress=False)
    words = [sys.executable, "-c", COMMAND, "store", command[0], str(tmp_path), *command[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert ("all well" in done.stderr) == (command[0] == "verify")


@pytest.mark.parametrize("package", LAZY)
def test_names_that_are_imported_at_first_use(package: str) -> None:
    """All are there, and none is a module's name, which would take its place once that module is imported."""
    found = import_module(package)
    assert dir(found) == sorted(found.__all__)
    modules = {module.name for module in iter_modules(found.__path__)}
    for name in found.__all__:
        assert getattr(found, name) is not None
        assert name not in modules
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        found.nonsense  # noqa: B018  # read for its error
