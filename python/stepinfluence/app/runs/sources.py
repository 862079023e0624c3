"""Which files a project's code is in: the project file, and what it imports from its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from stepinfluence.files import file_digest


def sources_of(file: Path) -> dict[str, str]:
    """SHA-256 of a project file and of every module beside it that it imports, by their paths from its folder.

    Found in the text of the files, wherever an ``import`` stands in them; a name that only the running program knows
    (``importlib.import_module(name)``) is not. Empty where there is no file.
    """
    if not file.is_file():
        return {}
    folder = file.absolute().parent
    found: dict[str, str] = {}
    waiting = [file.absolute()]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(folder).as_posix()
        if name in found:
            continue
        found[name] = file_digest(path)
        for module in _imported(path, folder):
            waiting += _files(folder, module)
    return dict(sorted(found.items()))


def _imported(path: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file may import, as parts of their names seen from the folder."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # it is no module that could be imported
        return
    package = path.relative_to(folder).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            yield module
            for alias in node.names:  # a module of the package, or a name in it
                yield (*module, alias.name)


def _files(folder: Path, module: tuple[str, ...]) -> Iterator[Path]:
    """The files in the folder that importing a module runs: the packages on the way, and its own."""
    for length in range(1, len(module) + 1):
        place = folder.joinpath(*module[:length])
        for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if path.is_file():
                yield path
