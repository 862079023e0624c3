"""The ``sdi`` command: help, errors in one line, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stepinfluence
import stepinfluence.app.demo.run
from stepinfluence.app.cli import app
from stepinfluence.app.cli._common import Stopped, end_on_signals, interrupted
from stepinfluence.app.demo.data import DemoConfig
from stepinfluence.app.demo.run import run_demo
from stepinfluence.errors import LossError
from typer.testing import CliRunner, Result

pytest.importorskip("plotly")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})


def test_version() -> None:
    done = invoke("--version")
    assert done.exit_code == 0
    assert done.stdout.strip() == f"sdi {stepinfluence.__version__}"


def test_help_teaches() -> None:
    top = invoke("--help")
    assert top.exit_code == 0
    for words in ("First steps", "sdi doctor", "sdi demo --quick", "Exit status", "--debug"):
        assert words in top.stdout
    demo = invoke("demo", "-h").stdout
    for words in ("parity", "report.html", "sdi demo --open", "--seed", "--config"):
        assert words in demo


def test_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stepinfluence", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == f"sdi {stepinfluence.__version__}"


def test_help_loads_no_plotting() -> None:
    code = "import sys, stepinfluence.app.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {"plotly", "matplotlib"} & set(done.stdout.split())


def test_doctor() -> None:
    text = invoke("doctor")
    assert text.exit_code == 0
    for words in ("Versions", "torch", "CPU", "Sketches run on", "Route"):
        assert words in text.stdout
    done = invoke("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["sdi-kernels"] == stepinfluence.__version__
    assert {plan["route"] for plan in found["plans"]} <= {"direct", "fft"}
    assert all(plan["route"] in plan["why"] for plan in found["plans"])


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "! transformers not installed: run pip install 'sdi-kernels[hf]'\n" in invoke("doctor").stdout


def one_line(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "checkpoints" / "mine.pt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert "not empty" in one_line(invoke("demo", "--quick", "--out", tmp_path))
    assert precious.read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_line(invoke("demo", "--quick", "--out", tmp_path / "file"))


def test_config_that_is_not_one(tmp_path: Path) -> None:
    assert "config:" in one_line(invoke("demo", "--config", tmp_path / "none.json", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    done = invoke("demo", "--config", tmp_path / "none.json", "--seed", "3")
    assert done.exit_code == 2
    assert "--config" in done.stderr
    assert invoke("demo", "--seed", "-1").exit_code == 2
    assert invoke("nonsense").exit_code == 2


def test_missing_extra_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    message = one_line(invoke("demo", "--out", tmp_path / "out"))
    assert "plotly" in message
    assert "pip install 'sdi-kernels[report]'" in message
    assert not (tmp_path / "out").exists()


def test_library_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LossError("loss_fn: loss is NaN\nfor row 3")

    monkeypatch.setattr(stepinfluence.app.demo.run, "run_demo", fail)
    assert "sdi: loss_fn: loss is NaN for row 3" in one_line(invoke("demo", "--quick", "--out", tmp_path / "a"))
    for arguments in (["--debug", "demo", "--quick"], ["demo", "--quick", "--debug"]):
        done = invoke(*arguments, "--out", tmp_path / "a")
        assert done.exit_code == 1
        assert isinstance(done.exception, LossError)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stepinfluence.app.demo.run, "run_demo", interrupt)
    done = invoke("demo", "--quick", "--out", tmp_path / "a")
    assert done.exit_code == 130
    assert "Traceback" not in done.output
    # What was left is a demo's folder, so the next try may use it.
    assert invoke("demo", "--quick", "--out", tmp_path / "a").exit_code == 130


def test_unsolved_task_fails_loudly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick = DemoConfig.quick()
    hard = replace(
        quick, required_accuracy=0.99, training=replace(quick.training, min_steps=1, final_steps=3, warmup_steps=1)
    )
    monkeypatch.setattr(stepinfluence.app.demo.run, "run_demo", lambda _, *a, **k: run_demo(hard, *a, **k))
    done = invoke("demo", "--quick", "--out", tmp_path / "a")
    assert done.exit_code == 1
    assert "NOT SOLVED" in done.stderr
    assert (tmp_path / "a" / "report.html").exists()
    for words in ("Task", "Accuracy", "helpful", "largest at", "Conservation error", "peak MiB", "Open"):
        assert words in done.stdout


def test_signals_that_are_ignored_stay_ignored() -> None:
    """``nohup sdi ...`` goes on; SIGTERM becomes an interruption with a status of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_on_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(Stopped) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert interrupted(caught.value).exit_code == 143
        assert interrupted(KeyboardInterrupt()).exit_code == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("stepinfluence.app.runs.stored.StoredRun.open", stopped)
    done = CliRunner().invoke(app, ["influence", str(tmp_path)])
    assert done.exit_code == 143
    assert done.stderr.strip().endswith("interrupted by SIGTERM: nothing is half-written")
