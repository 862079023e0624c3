"""A self-contained HTML page of step-decomposed influence, for any run: fill in a :class:`Report`, write it.

The page needs no network and no server: plotly.js, data, style and script are all in the one file.
"""

from stepinfluence.app.view.report.data import Accuracy, Check, QueryItem, Report, Stage, TrainItem, View
from stepinfluence.app.view.report.page import render_report, write_report

__all__ = [
    "Accuracy",
    "Check",
    "QueryItem",
    "Report",
    "Stage",
    "TrainItem",
    "View",
    "render_report",
    "write_report",
]
