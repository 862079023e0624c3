"""One run for all tests of the explorer: nothing writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from explored import write_run
from serving import Served, serving
from stepinfluence import Fisher, Project
from stepinfluence.app.runs import Prepared, RunConfig, SplitConfig, run_splits
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.app.view.explore import Explorer
from stepinfluence.app.view.explore.model import RunModel
from token_project import write_checkpoints, write_project


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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium."""
    import browsing

    driver = browsing.start(tmp_path_factory.mktemp("downloads"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a project with tokens, losses by token and answers, whose training split is stored per step."""
    folder = tmp_path_factory.mktemp("words")
    project = write_project(folder / "words.py")
    split = SplitConfig(per_step=True, batch_size=4, shard_rows=8, threads=1)
    pattern = write_checkpoints(project, folder)
    config = RunConfig(project, {"train": split, "query": split}, (pattern,), sketch_size=32)
    list(run_splits(Prepared(Project.load(project), config, torch.device("cpu")), folder / "run", progress=False))
    return folder / "run"


@pytest.fixture(scope="session")
def told(words: Path) -> Explorer:
    """That run with its model."""
    return Explorer.open(words, model=RunModel(StoredRun.open(words)))
