"""Help is for people: no names of Python's types, examples in one piece at 80 columns; and it is there at once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from stepinfluence.app.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[4]
COMMANDS = [
    "", "demo", "doctor", "evaluate", "explore", "report", "init", "featurize", "query", "influence", "outliers",
    "store", "store info", "store verify", "store merge", "store export",
]  # fmt: skip
SLOW = {"torch", "numpy", "pandas", "matplotlib", "plotly", "jinja2", "transformers", "scipy", "yaml", "safetensors"}
"""Modules that take long to import, or that help has no need of."""


def help_of(command: str) -> str:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exit_code == 0
    return done.stdout


def commands(group: Any) -> set[str]:
    found = {""}
    for name, command in group.commands.items():
        found |= {f"{name} {inner}".strip() for inner in commands(command)} if hasattr(command, "commands") else {name}
    return found


def test_all_commands_are_looked_at() -> None:
    assert commands(typer.main.get_command(app)) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_types_of_python(command: str) -> None:
    text = help_of(command)
    assert not {
        word for word in ("<bool>", "<str>", "<int>", "<path>", "<float>", "list[", "None", "Path") if word in text
    }
    assert "\\[" not in text
    assert "…" not in text, "cut"


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_in_one_piece(command: str) -> None:
    shown = {line.strip() for line in help_of(command).splitlines()}
    module = f"python/stepinfluence/app/cli/{command.split()[0] if command else '__init__'}.py"
    file = ROOT / module.replace("report.py", "explore.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name.endswith("HELP") and (name == "HELP" or name == f"{command.upper()}_HELP") and " " not in command:
            texts = [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            lines = [
                Text.from_markup(line).plain
                for text in texts
                for line in text.splitlines()
                if line.startswith("  [cyan]")
            ]
            assert {line.strip() for line in lines if "{" not in line} <= shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["query", "--help"],
        ["nonsense"],
        ["query", "--nonsense"],
        ["init", "project.py"],
        ["query", "none", "--row", "0"],
        ["influence", "none"],
        ["outliers", "none"],
        ["explore", "none"],
        ["report", "none"],
        ["store", "info", "none"],
        ["featurize", "--project", "none.py", "--out", "run"],
    ],
)
def test_what_needs_no_torch_imports_none(arguments: list[str], tmp_path: Path) -> None:
    """Not the time that it takes, which is the machine's, but what it would be spent on."""
    code = (
        "import json, sys\n"
        f"sys.argv = ['sdi', *{arguments!r}]\n"
        "from stepinfluence.app.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "open('modules.json', 'w').write(json.dumps([code, *sys.modules]))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    code_, *modules = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    assert code_ == (2 if {"none", "none.py", "nonsense", "--nonsense"} & {*arguments} else 0)
    assert not SLOW & {module.partition(".")[0] for module in modules}
