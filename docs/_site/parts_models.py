"""The tables in docs/capture.md."""

from __future__ import annotations

from kept import Parts, load, source, table


def models() -> str:
    """docs/capture.md: models of many kinds, errors and cost."""
    from bench.models.__main__ import HEAD, cells

    result = load("models.json")
    return f"{source('models.json', False, result)}\n\n" + table([*HEAD], [cells(row) for row in result["rows"]])


def workspace() -> str:
    """docs/capture.md: what it saves and costs that uses wait."""
    from bench.workspace import HEAD, cells

    result = load("workspace.json")
    return f"{source('workspace.json', False, result)}\n\n" + table([*HEAD], [cells(row) for row in result["rows"]])


PARTS: Parts = {"models": models, "workspace": workspace}
