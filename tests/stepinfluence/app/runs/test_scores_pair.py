"""A score table and its description are of one call, whenever a call is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import random
import signal
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from stepinfluence.app.runs.scores import scores_problem, write_scores
from stepinfluence.store import Store


def write(folder: Path, number: int, kill_at: int = 0) -> None:
    """Write table ``number``; be killed at the ``kill_at``-th fsync, rename or removal."""
    torch.set_num_threads(1)
    left = kill_at

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, wrapped)

    if kill_at:
        for owner, name in ((os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "unlink")):
            counted(owner, name)
    train, query = Store.open(folder / f"train-{number}"), Store.open(folder / "query")
    write_scores(train, query, folder / "s.npy", parameters=None, device=None, progress=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        values = made.features(made.normal(9, made.WIDTH, seed=number), prefix=f"t{number}-")
        made.store(tmp_path / f"train-{number}", [values])
    made.store(tmp_path / "query", [made.features(made.normal(3, 2, made.WIDTH, seed=5), prefix="q")])
    return tmp_path


def test_killed_at_every_write_fsync_and_rename(folder: Path) -> None:
    tables = []
    for number in range(2):
        write(folder, number)
        assert scores_problem(folder / "s.npy") is None
        tables.append((folder / "s.npy").read_bytes())
    assert tables[0] != tables[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stepinfluence.app.runs.scores", "test_scores_pair"])
    deaths = seen_without = 0
    for count in range(1, 60):
        number = count % 2
        process = context.Process(target=write, args=(folder, number, count))
        process.start()
        process.join()
        described = (folder / "s.json").is_file()
        assert (scores_problem(folder / "s.npy") is None) == described, "a description that is there fits"
        if described:
            told = json.loads((folder / "s.json").read_text())["train"]["ids"][0]
            assert (folder / "s.npy").read_bytes() == tables[int(told[1])]
        assert np.load(folder / "s.npy").shape == (9, 3, 2)
        seen_without += not described
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        assert len(list(folder.glob(".aside-*"))) <= 2, "those of the last call alone"
    assert deaths > 6
    assert seen_without >= 2
    assert sorted(p.name for p in folder.iterdir()) == ["query", "s.json", "s.npy", "train-0", "train-1"]


def test_scores_of_another_call_are_found(folder: Path) -> None:
    write(folder, 0)
    kept = (folder / "s.json").read_bytes()
    write(folder, 1)
    (folder / "s.json").write_bytes(kept)
    assert "not the scores that s.json describes" in str(scores_problem(folder / "s.npy"))
    for content in (b"", b"[]", b"{}", b'{"scores": 3}', b"\xff"):
        (folder / "s.json").write_bytes(content)
        assert "run sdi influence again" in str(scores_problem(folder / "s.npy"))
    (folder / "s.npy").unlink()
    (folder / "s.json").write_bytes(kept)
    assert scores_problem(folder / "s.npy") is not None


def test_any_damage_is_found(folder: Path) -> None:
    """Scores, and the ids beside them: neither is taken for what was written if a byte of it is another one."""
    write(folder, 0)
    rng = random.Random(0)
    for name in ("s.npy", "s.json"):
        path, whole = folder / name, (folder / name).read_bytes()
        for place in [*range(min(len(whole), 60)), *(rng.randrange(len(whole)) for _ in range(200))]:
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            assert scores_problem(folder / "s.npy") is not None, (name, place)
        path.write_bytes(whole)
        assert scores_problem(folder / "s.npy") is None
