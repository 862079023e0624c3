"""Commands called within the test's process, and a run of the blank template to ask."""

from __future__ import annotations

from pathlib import Path

from stepinfluence.app.cli import app
from typer.testing import CliRunner, Result


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})


def invoke(*arguments: object, code: int = 0) -> Result:
    done = call(*arguments)
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: object) -> str:
    lines = invoke(*arguments, code=2).stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("sdi: ")]) == 1, lines
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def featurized(folder: Path, extra: str = "", *more: object) -> Path:
    """A run of the blank template, with something added to its project file."""
    invoke("init", folder / "p.py", "--template", "blank")
    with (folder / "p.py").open("a", encoding="utf-8") as file:
        file.write(extra)
    asked = ("featurize", "-p", folder / "p.py", "-s", "train", "-s", "query", "--sketch-size", "64")
    invoke(*asked, "-o", folder / "run", *more)
    return folder / "run"
