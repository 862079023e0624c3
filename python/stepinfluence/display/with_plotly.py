"""The same figures by plotly: zoom, and every number under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from stepinfluence.display.style import HARMFUL, HELPFUL, INK
from stepinfluence.display.table import Hit
from stepinfluence.display.words import signed


def trajectories(helpful: Sequence[Hit], harmful: Sequence[Hit], title: str) -> go.Figure:
    figure = go.Figure(layout=_layout(title, "loop step", "influence at this step"))
    for hits, color, dash in ((helpful, HELPFUL, "solid"), (harmful, HARMFUL, "dash")):
        for hit in hits:
            steps = np.arange(1, len(hit.trajectory) + 1)
            figure.add_scatter(
                x=steps,
                y=np.asarray(hit.trajectory),
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker={"size": [9 if step == hit.peak_step else 3 for step in steps]},
                name=_plain(f"{hit.label}  {signed(hit.total)}"),
            )
    return figure


def profile(total: NDArray[Any], energy: NDArray[Any], title: str, *, places: NDArray[Any], axis: str) -> go.Figure:
    figure = go.Figure(layout=_layout(title, axis, "influence at this step"))
    colors = [HELPFUL if v >= 0 else HARMFUL for v in total]
    figure.add_bar(x=places, y=np.asarray(total), marker={"color": colors}, name="sum over examples")
    figure.add_scatter(x=places, y=np.asarray(energy), line={"color": INK, "shape": "hvh"}, name="regardless of sign")
    return figure


def heatmap(values: NDArray[Any], labels: Sequence[str], title: str, across: str, down: str) -> go.Figure:
    figure = go.Figure(layout=_layout(title, across, down))
    places = np.arange(len(values))
    figure.add_heatmap(
        x=np.arange(1, values.shape[1] + 1), y=places, z=np.asarray(values), colorscale="RdBu", zmid=0,
        colorbar={"title": "influence"},
    )  # fmt: skip
    figure.update_yaxes(tickvals=places, ticktext=[_plain(label) for label in labels], autorange="reversed")
    figure.update_layout(height=240 + 22 * len(values))
    return figure


def _layout(title: str, across: str, down: str) -> dict[str, Any]:
    return {
        "title": {"text": _plain(title)},
        "template": "plotly_white",
        "xaxis": {"title": {"text": across}},
        "yaxis": {"title": {"text": down}},
    }


def _plain(text: str) -> str:
    """Texts of examples hold no markup: plotly reads ``<b>`` and the like."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
