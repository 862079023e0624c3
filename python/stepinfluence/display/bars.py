"""Trajectories over loop steps as bars in a line of text, and texts of examples that are safe to print."""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

BLOCKS = "·▁▂▃▄▅▆▇█"
HELPFUL, HARMFUL = "#3a9bdc", "#e07b35"


def bars(scores: NDArray[np.floating], most: float, *, each: int = 1) -> Text:
    """One bar for each step (or ``each`` neighbouring ones: the strongest), blue where it helps, orange where it harms.

    Args:
        scores: ``(steps,)``.
        most: the magnitude of a full bar.
        each: steps per bar.
    """
    text = Text(no_wrap=True)
    for value in strongest(scores, each):
        # A square root, so that steps a tenth as strong as the strongest can still be seen.
        height = round((len(BLOCKS) - 1) * float(np.sqrt(min(1.0, abs(value) / most)))) if most > 0 else 0
        text.append(BLOCKS[height], style=HELPFUL if value >= 0 else HARMFUL)
    return text


def strongest(scores: NDArray[np.floating], each: int) -> NDArray[np.floating]:
    """Of every ``each`` neighbouring steps, the influence farthest from zero."""
    parts = np.split(scores, range(each, len(scores), each))
    return np.array([part[np.abs(part).argmax()] for part in parts])


def printable(text: object, limit: int = 2000) -> Text:
    """Text of an example as it can be shown in one line: whatever moves the cursor or turns the writing direction
    becomes a visible sign, so that an example cannot draw on the terminal."""
    shown = str(text)[:limit]
    clean = "".join(
        " " if c.isspace() else c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") else "�"
        for c in shown
    )
    return Text(clean, no_wrap=True, overflow="ellipsis")
