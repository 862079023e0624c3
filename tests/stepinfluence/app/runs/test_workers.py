"""Several processes: started by torchrun, killed and started again, interrupted, and never an other byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import content
from stepinfluence.app.cli import app
from stepinfluence.store import Store
from typer.testing import CliRunner

COMMAND = ("-m", "stepinfluence", "featurize")
OPTIONS = ("--split", "train", "--sketch-size", "16", "--batch-size", "2", "--shard-rows", "4", "--threads", "1")


def start(project: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *COMMAND, "--project", str(project), *OPTIONS, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def alone(project: Path, out: Path) -> str:
    """In this process, which has torch already: what it says on stderr."""
    done = CliRunner().invoke(app, ["featurize", "--project", str(project), *OPTIONS, "--out", str(out)])
    assert (done.exit_code, done.stdout) == (0, "")
    return done.stderr


def rank(number: int, size: int) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}


@pytest.mark.slow
def test_a_killed_worker_of_four_is_started_again(project_file: Path, tmp_path: Path) -> None:
    alone(project_file, tmp_path / "alone")
    many = tmp_path / "many"
    # Row 15 is in shard 3, and so worker 3's.
    codes = [finish(p)[0] for p in [start(project_file, many, **rank(k, 4), DIE_AT="15") for k in range(4)]]
    assert codes == [0, 0, 0, -signal.SIGKILL]
    store = Store.open(many / "train")
    assert store.missing() == [(0, 3)]
    code, _, err = finish(start(project_file, many, **rank(3, 4)))
    assert code == 0
    assert "worker 3 of 4" in err
    assert "complete: 22 examples" in err
    assert content(many) == content(tmp_path / "alone")
    assert "nothing left to do" in alone(project_file, many)


@pytest.mark.slow
def test_torchrun(project_file: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    subprocess.run(
        [*launch, *COMMAND, "--project", str(project_file), *OPTIONS, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
        check=True,
    )
    alone(project_file, tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_two_identical_commands_at_once(project_file: Path, tmp_path: Path) -> None:
    """One does the work, the other says who does: no byte is another's."""
    alone(project_file, tmp_path / "alone")
    both = [start(project_file, tmp_path / "both") for _ in range(2)]
    results = [finish(process) for process in both]
    refused = [err for code, _, err in results if code == 2]
    assert [code for code, _, _ in results if code != 2]
    for err in refused:
        assert "another command is writing here (process " in err
    assert all(code in (0, 2) for code, _, _ in results), results
    assert content(tmp_path / "both") == content(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_interrupted(project_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    slow = tmp_path / "slow.py"
    text = project_file.read_text().replace(
        "def loss(model, batch):",
        "import time\ndef loss(model, batch):\n    time.sleep(float(os.environ.get('SLOW', 0)))",
    )
    slow.write_text(text)
    process = start(slow, tmp_path / "run", SLOW="0.3")
    first = tmp_path / "run" / "train" / "c000" / "shard-00000000.json"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert ("interrupted" if number == signal.SIGINT else f"interrupted by {number.name}") in err
    assert out == ""
    assert "finished shards are kept; repeat the command to go on" in err
    assert "Traceback" not in err
    assert not Store.open(tmp_path / "run" / "train").complete
    left = {path.name for path in (tmp_path / "run").rglob(".*")}
    assert left <= {".written-here"}, "neither a lock nor a file aside"
    alone(slow, tmp_path / "run")
    assert Store.open(tmp_path / "run" / "train").complete
