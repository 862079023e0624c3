"""The numbers of the page: what each query's plots show, chosen and packed for embedding in HTML."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stepinfluence.app.view.report.data import Array, QueryItem, Report
from stepinfluence.attribution.aggregation import dominating
from stepinfluence.attribution.periods import period_of
from stepinfluence.display.words import peak_step, top_rows, visible

ROWS_PER_SIDE = 24
"""Training examples kept for each query on either side: the most helpful and the most harmful ones."""


def find_peaks(values: ArrayLike) -> list[int]:
    """1-based steps at which a profile peaks: higher than both neighbours and than the mean of the nearest five.

    A plateau counts once, at its first step.
    """
    x = np.asarray(values, dtype=np.float64)
    padded = np.concatenate([[-np.inf], x, [-np.inf]])
    higher = (padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:])
    return [
        t + 1 for t in range(len(x)) if higher[t] and x[t] > x[max(0, t - 2) : t + 3].mean() + 1e-3 * np.abs(x).max()
    ]


def payload(report: Report) -> dict[str, Any]:
    """Everything the page's script needs, as JSON-able values; arrays are packed by :func:`pack`."""
    groups = list(dict.fromkeys(item.group for item in report.train if item.group))
    members = {g: [i for i, item in enumerate(report.train) if item.group == g] for g in groups}
    queries = [_query(report, q, members) for q in range(len(report.queries))]
    used = sorted({row for query in queries for view in query["views"] for row in view["rows"]})
    return {
        "steps": report.sdi.shape[2],
        "views": [
            {"name": visible(view.name), "unit": visible(view.unit), "note": visible(view.note)}
            for view in report.views
        ],
        "first": report.first_query,
        "checkpoints": [visible(c) for c in report.checkpoints] if report.energy_by_checkpoint is not None else [],
        "groupedBy": visible(report.grouped_by),
        "groups": [{"name": visible(g), "count": len(members[g])} for g in groups],
        "train": {
            str(i): {
                "id": visible(report.train[i].id),
                "text": visible(report.train[i].text),
                "label": visible(report.train[i].label),
                "group": visible(report.train[i].group),
            }
            for i in used
        },
        "queries": queries,
        "accuracyOf": report.accuracy_of,
        "accuracy": [{"name": a.name, "value": a.value, "trained": a.trained} for a in report.accuracy],
    }


def _query(report: Report, column: int, members: dict[str, list[int]]) -> dict[str, Any]:
    item: QueryItem = report.queries[column]
    read_step = item.read_step if item.read_step is not None else report.sdi.shape[2]
    energy = None if report.energy_by_checkpoint is None else report.energy_by_checkpoint[:, column]
    owner = None if energy is None else dominating(energy, [visible(c) for c in report.checkpoints])
    return {
        "id": visible(item.id),
        "text": visible(item.text),
        "tokens": [visible(t) for t in item.tokens],
        "loss": item.loss,
        "truth": visible(item.truth),
        "prediction": visible(item.prediction),
        "right": item.truth == item.prediction,
        "group": visible(item.group),
        "note": visible(item.note),
        "readStep": read_step,
        "margin": pack(item.margin) if item.margin is not None else None,
        "marginPeriod": None if item.margin is None else _period(item.margin[:read_step], "The margin"),
        "byCheckpoint": None if energy is None else pack(energy),
        "dominance": "" if owner is None else owner.sentence,
        "views": [_view(view.sdi[:, column], read_step, members) for view in report.views],
    }


def _view(scores: Array, read_step: int, members: dict[str, list[int]]) -> dict[str, Any]:
    """One query's influence ``(n_train, steps)`` as one view has it."""
    totals = scores.sum(1)
    helpful, harmful = top_rows(totals, ROWS_PER_SIDE)
    rows = helpful + harmful
    profile = scores.sum(0)
    energy = np.abs(scores).sum(0)
    found = _period(energy[:read_step], "Influence, regardless of sign,")
    return {
        "rows": rows,
        "helpful": len(helpful),
        "values": pack(scores[rows]),
        "totals": pack(totals[rows]),
        "peaks": [peak_step(scores[r]) for r in rows],
        "counts": [int((totals > 0).sum()), int((totals < 0).sum())],
        "profile": pack(profile),
        "energy": pack(energy),
        "byGroup": pack(np.stack([scores[m].mean(0) for m in members.values()])) if members else None,
        "period": found,
        "profilePeriod": _period(profile[:read_step], "Its signed sum"),
        "energyPeaks": find_peaks(energy[:read_step]) if found["found"] else [],
    }


def _period(curve: Array, what: str) -> dict[str, Any]:
    tested = period_of(curve)
    return {
        "found": tested.found,
        "lag": tested.lag,
        "correlation": tested.correlation,
        "p": tested.p_value,
        "says": tested.sentence(what),
    }


def pack(values: ArrayLike) -> dict[str, Any]:
    """An array as base64 of little-endian float32, exact and a third of the size of digits."""
    array = np.ascontiguousarray(values, dtype="<f4")
    return {"f4": base64.b64encode(array.tobytes()).decode("ascii"), "shape": list(array.shape)}
