"""Killed or out of space at any moment, a rerun ends with the very bytes of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killed
import pytest
import stores
from stepinfluence import StoreError
from stepinfluence.store import Store, StoreWriter, verify


@pytest.fixture(scope="module")
def fork() -> Callable[..., BaseProcess]:
    """Starts functions in processes of their own, which need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stepinfluence.store", "safetensors.torch"])

    def start(function: Callable[..., object], *args: Any) -> BaseProcess:
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return stores.content(stores.written(tmp_path_factory.mktemp("undisturbed") / "s", killed.MANIFEST).path)


def begun(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def check(path: Path, log: Path, deaths: int, undisturbed: dict[str, bytes]) -> None:
    """The store is whole, and no death cost more than the shard that was being written."""
    assert stores.content(path) == undisturbed
    assert verify(path) == []
    assert begun(log) <= 2 * killed.MANIFEST.n_shards + deaths


def test_killed_at_every_write_fsync_and_rename(
    tmp_path: Path, fork: Callable[..., BaseProcess], undisturbed: dict[str, bytes]
) -> None:
    """Each life gets one event further into what is left than the one before; kills fall on every kind of event."""
    path, log, deaths = tmp_path / "s", tmp_path / "log", 0
    for count in range(1, 40):
        process = fork(killed.run, path, log, count)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        if (path / "manifest.json").exists():
            store = Store.open(path)  # readable at any moment, with whatever is there
            for checkpoint in range(2):
                there = [s for s in range(6) if (checkpoint, s) not in store.missing()]
                store.features(checkpoint, rows=[4 * s for s in there])
    assert deaths > 10
    check(path, log, deaths, undisturbed)


def test_killed_at_random_moments(
    tmp_path: Path, fork: Callable[..., BaseProcess], undisturbed: dict[str, bytes]
) -> None:
    path, log, deaths = tmp_path / "s", tmp_path / "log", 0
    while deaths < 8:
        process, before = fork(killed.run_forever, path, log), begun(log)
        until = time.monotonic() + 60
        while begun(log) == before and process.is_alive() and time.monotonic() < until and not _complete(path):
            time.sleep(0.001)
        time.sleep(random.random() * 0.02)
        process.kill()
        process.join()
        deaths += 1
    fork(killed.run, path, log, 0).join()
    check(path, log, deaths, undisturbed)


def _error_of(function: Callable[..., object], *args: Any) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def _complete(path: Path) -> bool:
    return (path / "manifest.json").exists() and Store.open(path).complete


def test_disk_full_at_every_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    path, log, failures = tmp_path / "s", tmp_path / "log", 0
    for count in range(1, 40):
        with monkeypatch.context() as patch:
            killed.after(count, killed.disk_full, patch.setattr)
            if (error := _error_of(stores.write, path, killed.MANIFEST, log)) is None:
                break
        assert isinstance(error, StoreError)
        assert "No space left on device" in str(error)
        assert not list(path.rglob(".aside-*"))
        failures += 1
    assert failures > 10
    check(path, log, failures, undisturbed)


def test_files_that_may_not_grow(
    tmp_path: Path, fork: Callable[..., BaseProcess], undisturbed: dict[str, bytes]
) -> None:
    """The system's own refusal, which reaches the library that writes the arrays, too."""
    path, log = tmp_path / "s", tmp_path / "log"
    StoreWriter.create(path, killed.MANIFEST)
    largest = max(len(data) for name, data in undisturbed.items() if name.startswith("c000"))
    process = fork(killed.run_with_file_limit, path, log, largest // 2)
    process.join()
    assert process.exitcode == 1
    assert begun(log) == 1
    assert len(Store.open(path).missing()) == 12
    stores.write(path, killed.MANIFEST, log)
    check(path, log, 1, undisturbed)


def test_two_workers_and_a_third_that_does_it_all_again(
    tmp_path: Path, fork: Callable[..., BaseProcess], undisturbed: dict[str, bytes]
) -> None:
    """No locks: who writes a shard does not matter, and neither does how often."""
    path = tmp_path / "s"
    workers = [fork(killed.run, path, tmp_path / f"log-{k}", 0) for k in range(3)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, "finish() of the first leaves alone what another is still writing"
    assert stores.content(path) == undisturbed
