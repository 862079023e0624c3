"""One look for every figure of the experiments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stepinfluence.display.style import ACCENT, FAINT, HARMFUL, HELPFUL, INK, SOFT
from stepinfluence.display.style import STYLE as BASE

__all__ = ["ACCENT", "FAINT", "HARMFUL", "HELPFUL", "INK", "SERIES", "SOFT", "figure", "styled"]

# Okabe and Ito's colours: told apart with every kind of colour vision.
SERIES = ("#0072b2", "#c94f00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@contextmanager
def styled() -> Iterator[None]:
    """Figures made within have the project's look; math text stays off, as labels hold data."""
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context({**BASE, "axes.prop_cycle": cycler(color=SERIES), "legend.frameon": False}):
        yield


def figure(
    rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.6, **options: Any
) -> tuple[Any, Any]:
    """A figure without a window, and its axes as ``plt.subplots`` gives them; use it within :func:`styled`.

    Args:
        rows, columns: of axes.
        width, height: in inches, of the whole figure.
        options: of ``Figure.subplots``, such as ``sharey=True``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **options)
