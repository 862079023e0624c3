"""What a run's settings have otherwise than the paper's: the table that every report below its scale ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEFT_OUT = ("seed", "device", "data")
"""Settings of a run, not of the experiment."""


def differences(here: Mapping[str, Any], paper: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings that differ: name (with dots), value here, value at the ``paper`` scale.

    Args:
        here, paper: configurations as nested plain values.
    """
    ours, theirs = _flat(here), _flat(paper)
    names = [*ours, *(name for name in theirs if name not in ours)]
    shown = [(name, _short(ours.get(name)), _short(theirs.get(name))) for name in names]
    return [row for row in shown if row[1] != row[2] and row[0].split(".")[-1] not in LEFT_OUT]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        parts = [str(v.get("name", v)) if isinstance(v, Mapping) else _short(v) for v in value]
        return ", ".join(parts) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
