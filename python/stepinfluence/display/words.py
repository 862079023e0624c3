"""Numbers and texts of examples in words, for tables, charts and pages alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMULA = "=+-@"
"""What a cell that a spreadsheet calculates begins with, fullwidth forms of it included."""


def visible(text: str) -> str:
    """``text`` with control and direction characters spelled out, so that it can only be shown, never act.

    Line breaks and tabs become arrows; a right-to-left override becomes the six characters ``\\u202e``.
    """
    arrows = {"\n": "⏎", "\t": "⇥", "\r": ""}
    return "".join(
        arrows[c]
        if c in arrows
        else (f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\u200d" else c)
        for c in text
    )


def short(text: str, length: int) -> str:
    """A visible text of at most ``length`` characters."""
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def signed(value: float) -> str:
    """Three significant digits, with a sign, and without an exponent where that can be helped."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:+.2e}"
    return f"{value:+,.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def peak_step(trajectory: NDArray[Any]) -> int:
    """1-based step at which a trajectory is farthest from zero."""
    return 1 + int(np.abs(trajectory).argmax())


def top_rows(totals: NDArray[Any], per_side: int) -> tuple[list[int], list[int]]:
    """Rows of the most helpful examples (largest total first) and of the most harmful ones (smallest first).

    Only examples with a total of that sign are taken, so the two never overlap.
    """
    order = np.argsort(-totals, kind="stable")
    helpful = [int(i) for i in order[:per_side] if totals[i] > 0]
    harmful = [int(i) for i in order[::-1][:per_side] if totals[i] < 0]
    return helpful, harmful


def harmless(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(cell, str):
        return cell
    first = unicodedata.normalize("NFKC", cell.lstrip()[:1])[:1]
    return f"'{cell}" if cell[:1] in ("\t", "\r") or (first and first in FORMULA) else cell


def one_type(values: Sequence[Any]) -> list[Any]:
    """Ids as a column of a table can hold them: as they are if all are text or all integers, else all as text."""
    same = len({type(value) for value in values}) <= 1 and (not values or isinstance(values[0], str | int))
    return list(values) if same else [str(value) for value in values]
