"""``sdi report`` and ``sdi explore`` run a project's code only of runs that were written here, or when told to."""

from __future__ import annotations

import shutil
from pathlib import Path

from stepinfluence.app.cli import app
from stepinfluence.app.cli.explore import _model
from stepinfluence.app.runs.trust import MARK
from typer.testing import CliRunner, Result


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done


def test_a_copied_run_is_shown_but_its_project_is_not_run(words: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(words, copy)
    shutil.copy(words.parent / "words.py", tmp_path / "words.py")
    for file in words.parent.glob("step-*.pt"):
        shutil.copy(file, tmp_path / file.name)
    model, why = _model(copy, None, trusted=False)
    assert model is None
    assert "this run was not written here by you" in why
    assert "start sdi explore with --trust-project" in why
    out = tmp_path / "page.html"
    refused = invoke("report", copy, "--tokens", "--out", out, code=2)
    assert "add --trust-project" in refused.stderr
    assert not out.exists()
    invoke("report", copy, "--queries", "1", "--out", out)  # what is stored needs no project
    assert '"tokens":{"tokens"' not in out.read_text(encoding="utf-8")
    assert not (copy / MARK).is_file() or _model(copy, None, trusted=False)[0] is None
    invoke(
        "report", copy, "--queries", "1", "--exact", "--tokens", "--trust-project", "--curvature", "none", "--out", out
    )
    written = out.read_text(encoding="utf-8")
    assert '"tokens":{"tokens"' in written
    assert '"remain":{"helpful"' in written
    assert _model(copy, None, trusted=False)[0] is not None  # it was trusted once


def test_a_run_without_a_config_has_no_model(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "run", ignore=shutil.ignore_patterns("config.yaml"))
    model, why = _model(tmp_path / "run", None, trusted=False)
    assert model is None
    assert "config.yaml" in why
