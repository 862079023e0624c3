"""Programs that featurize into a store, or score a training: killed at any moment they end as undisturbed ones."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killed_programs
import pytest
from stepinfluence.store import verify

from bench.attack.mutate import content_of


@pytest.fixture(scope="module")
def ended() -> Callable[..., int | None]:
    """Runs a function in a process of its own, which need not import torch again; its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_programs", "stepinfluence.capture", "stepinfluence.store.writer"])

    def end(function: Callable[..., object], *args: Any) -> int | None:
        process: BaseProcess = context.Process(target=function, args=args)
        process.start()
        process.join()
        return process.exitcode

    return end


def whole(program: str, at: Path, ended: Callable[..., int | None]) -> dict[str, bytes]:
    at.mkdir()
    assert ended(killed_programs.run, program, at) == 0
    return content_of(at)


@pytest.mark.slow
@pytest.mark.parametrize("program", killed_programs.PROGRAMS)
def test_killed_at_every_dealing_with_files(program: str, ended: Callable[..., int | None], tmp_path: Path) -> None:
    """Each life gets three further into what is left than the one before."""
    wanted, at, deaths = whole(program, tmp_path / "whole", ended), tmp_path / "at", 0
    at.mkdir()
    for event in range(1, 200, 3):
        status = ended(killed_programs.run, program, at, event)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        deaths += 1
    assert deaths > 3
    assert content_of(at) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("program", ["capture", "training"])
def test_files_that_may_not_grow(program: str, ended: Callable[..., int | None], tmp_path: Path) -> None:
    wanted, at = whole(program, tmp_path / "whole", ended), tmp_path / "at"
    at.mkdir()
    for limit in (100, 500, 1200, 3000):
        if ended(killed_programs.run, program, at, 0, limit) == 0:
            break
        assert not list(at.rglob(".aside-*"))
    else:
        assert ended(killed_programs.run, program, at) == 0
    assert content_of(at) == wanted


def test_a_loss_that_raises(ended: Callable[..., int | None], tmp_path: Path) -> None:
    wanted, at = whole("capture", tmp_path / "whole", ended), tmp_path / "at"
    at.mkdir()
    for call in (1, 3, 5, 9):
        with pytest.raises(RuntimeError, match="the loss has no more"):
            killed_programs.failing(at, call)
        assert not list(at.rglob(".aside-*"))
        assert all(problem.endswith("was not written") for problem in verify(at / "store"))
    killed_programs.failing(at, 0)
    assert content_of(at) == wanted
