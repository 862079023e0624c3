"""Every module can be the first one that is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["attribution.preconditioners", "store", "app.runs"])
def test_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import stepinfluence.{module}"], check=True, timeout=120)
