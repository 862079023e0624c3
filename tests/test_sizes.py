"""Files under 400 lines, functions under 80 lines and of at most 12 parameters: what does one thing fits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import architecture

ROOT = Path(__file__).resolve().parents[1]
FILE, FUNCTION, PARAMETERS = 400, 80, 12

# Where the number of parameters is an interface of its own: a command line, what users write `attach(...)` for, the
# published package's signature, and the one call from checkpoints to influence.
INTERFACES = (
    "app/cli/",
    "compat.py",
    "capture/sketched.py: attach",
    "attribution/scoring.py: influence_over_checkpoints",
)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton" in ast.unparse(d) or "jit" in ast.unparse(d) for d in function.decorator_list)


def too_large(file: Path) -> Iterator[str]:
    source, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    if source.count("\n") > FILE:
        yield name
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_kernel(node):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
        long = (node.end_lineno or 0) - node.lineno + 1 > FUNCTION
        place = f"{name}: {node.name}"
        if long or (count > PARAMETERS and not any(interface in place for interface in INTERFACES)):
            yield place


def test_nothing_is_too_large() -> None:
    files = [*architecture.modules().values(), *(ROOT / "docs" / "_site").glob("*.py")]
    assert len(files) > 200
    assert {place for file in files for place in too_large(file)} == set()
