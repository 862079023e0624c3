"""Colours of every figure, table and page, and how charts by matplotlib look."""

from __future__ import annotations

from typing import Any

HELPFUL, HARMFUL = "#0072b2", "#c94f00"
INK, SOFT, FAINT, ACCENT = "#1c1e21", "#5a6068", "#e3e1da", "#3d4b5c"
STYLE: Any = {  # its keys have a type of their own in some versions of matplotlib, not in others
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "text.parse_math": False,  # a "$" in an example is a dollar
}
