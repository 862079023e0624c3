"""Messages that docs/troubleshooting.md explains are messages that the code gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = [
    line.split("|")[1].strip()
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("| message", "|---"))
]


def strings() -> str:
    """All texts of the library, literal parts of f-strings joined by a hole."""
    found = []
    for folder in ("python/stepinfluence", "sdi_kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\x00" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


LIBRARY = strings()


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_it(message: str) -> None:
    assert re.search(re.escape(message), LIBRARY), f"no message of the code holds {message!r}"


def test_there_are_some() -> None:
    assert len(MESSAGES) > 20
