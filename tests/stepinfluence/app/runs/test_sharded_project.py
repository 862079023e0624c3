"""A project whose model is sharded over the processes that featurize it: the bytes of the whole model's run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from folders import content
from processes import together
from stepinfluence import Project
from stepinfluence.app.cli import app
from stepinfluence.store import Store
from torch.multiprocessing.spawn import ProcessException
from typer.testing import CliRunner

EXAMPLE = Path(__file__).parents[4] / "examples" / "sharded_gpt.py"
OPTIONS = ("--sketch-size", "16", "--batch-size", "2", "--shard-rows", "4", "--threads", "1")
SHARDED = """
def model():
    built = Looped()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from torch.distributed.fsdp import fully_shard
        mesh = torch.distributed.init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        fully_shard(built.core, mesh=mesh)
        fully_shard(built, mesh=mesh)
    return built

def answer(model, batch):
    return [f"{value:.3f}" for value in model(batch["x"], 3).tolist()]
"""

PARALLEL = """
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        parallelize_module(built.core, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
"""


def featurize(project: Path, out: Path, *options: str) -> None:
    given = ["--project", str(project), "--checkpoints", str(project.with_name("*.pt")), *OPTIONS]
    done = CliRunner().invoke(
        app, ["featurize", *given, "--split", "train", "--split", "query", "--out", str(out), *options]
    )
    assert done.exit_code == 0, (done.stderr, done.exception)


def featurize_example(out: Path) -> None:
    """The project file that docs/cluster.md starts from."""
    os.environ["LOOPED_GPT"] = "tiny"
    given = ["--project", str(EXAMPLE), "--split", "query", "--out", str(out), *OPTIONS, "--shard-rows", "2"]
    done = CliRunner().invoke(app, ["featurize", *given])
    assert done.exit_code == 0, (done.stderr, done.exception)


def in_one_of_several(rank: int, project: Path, out: Path, dying: str) -> None:
    if dying:
        os.environ["DIE_AT"] = dying
    featurize(project, out)


def halves_of(project: Path, rank: int) -> Path:
    """The project with a mesh of two processes, however many there are."""
    path = project.with_name(f"halves-{rank}.py")
    path.write_text(project.read_text().replace('(int(os.environ["WORLD_SIZE"]),)', "(2,)"))
    return path


def refused(rank: int, project: Path, out: Path) -> None:
    with pytest.raises(AssertionError, match=r"got skip, but model\(\) is sharded over processes"):
        featurize(project, out, "--on-error", "skip")
    os.environ["WORLD_SIZE"] = "4"
    with pytest.raises(AssertionError, match=r"model\(\) is sharded over 2 processes, and 4 were started"):
        featurize(halves_of(project, rank), out)
    os.environ["WORLD_SIZE"] = "2"
    parallel = project.with_name(f"parallel-{rank}.py")
    shards = "        fully_shard(built.core, mesh=mesh)\n        fully_shard(built, mesh=mesh)\n"
    text = project.read_text()
    assert shards in text
    parallel.write_text(text.replace(shards, PARALLEL))
    with pytest.raises(AssertionError, match="is tensor-parallel, and sdi featurize gives every process examples"):
        featurize(parallel, out)


def both(rank: int, project: Path, out: Path) -> None:
    in_one_of_several(rank, project, out, "")
    featurize_example(out.with_name("example"))
    refused(rank, project, out.with_name("refused"))


@pytest.fixture
def project(write_project: Callable[..., Path]) -> Path:
    path = write_project(
        ("\ndef model():\n    return Looped()\n", SHARDED),
        ("nn.Linear(6, 6)", "nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)"),
    )
    model = Project.load(path).model()
    for step in range(2):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path.with_name(f"{step}.pt"))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_the_same_bytes_and_one_that_is_killed(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPED_GPT", "")  # put back afterwards
    featurize_example(tmp_path / "example-alone")
    featurize(project, tmp_path / "alone")
    expected = content(tmp_path / "alone")
    together(both, 2, tmp_path, project, tmp_path / "two")
    assert content(tmp_path / "two") == expected
    assert content(tmp_path / "example") == content(tmp_path / "example-alone")
    killed = tmp_path / "killed"
    with pytest.raises(ProcessException):
        together(in_one_of_several, 2, tmp_path, project, killed, "15")  # row 15 is in shard 3, and so process 1's
    assert (0, 3) in Store.open(killed / "train").missing()
    together(in_one_of_several, 2, tmp_path, project, killed, "")
    assert content(killed) == expected
