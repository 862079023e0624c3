"""One run for all tests of the explorer: nothing writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from explored import write_run
from serving import Served, serving
from stepinfluence import Fisher
from stepinfluence.app.view.explore import Explorer


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("explore") / "my <run>")


@pytest.fixture
def explorer(run: Path) -> Explorer:
    return Explorer.open(run)


@pytest.fixture(scope="session")
def corrected(run: Path) -> Explorer:
    """The same run with a curvature for each checkpoint: its scores come first, SDI second."""
    return Explorer.open(run, curvatures=lambda s: ([Fisher.fit(s, checkpoint=k, damping=0.1) for k in (0, 1)], ""))


@pytest.fixture(scope="session")
def served(run: Path) -> Iterator[Served]:
    """The run behind a real server on a free port."""
    with serving(Explorer.open(run)) as served:
        yield served
