"""How much of a query's influence comes from each checkpoint (:mod:`stepinfluence.attribution.aggregation`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stepinfluence.attribution.curvature import Choice, Damping
from stepinfluence.attribution.space import Parameters
from stepinfluence.search.question import ask
from stepinfluence.search.sources import Rows

MOST_ROWS = 4096
"""Training rows that the energies are summed over: all, or this many spread evenly over a larger store."""

ENERGY_BYTES = 64 << 20
"""Decoded rows and scores that are held at a time."""


def checkpoint_energy(
    train: Rows,
    query: Rows,
    *,
    etas: float | Sequence[float] | None = None,
    parameters: Parameters = None,
    curvature: Choice = "none",
    damping: Damping | None = None,
    most_rows: int = MOST_ROWS,
) -> NDArray[np.float64]:
    """SDI energy of each query by checkpoint: absolute influence, summed over training rows and query steps.

    Args:
        train, query, etas, parameters, curvature, damping: as for :func:`stepinfluence.search.top_k`.
        most_rows: look at this many rows, evenly spread, where there are more: enough for shares.

    Returns:
        ``(K, Q)``; NaN for queries without features.

    Raises:
        FeatureMismatchError, StoreError, ValueError, TypeError: as for :func:`stepinfluence.search.top_k`.
    """
    if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 1:
        raise ValueError(f"most_rows: got {most_rows!r}; give a positive number of rows")
    question = ask(train, query, etas=etas, parameters=parameters, curvature=curvature, damping=damping)
    source = question.train
    known = np.flatnonzero(source.valid)
    if len(known) > most_rows:
        known = known[np.linspace(0, len(known) - 1, most_rows).round().astype(np.int64)]
    queries, steps = len(question.query_ids), question.steps
    width = source.spaces[0].width * (steps if source.per_step else 1) + queries * steps
    some = max(1, ENERGY_BYTES // (4 * max(1, width)))
    energy = torch.zeros(len(source.spaces), queries, dtype=torch.float64)
    with torch.no_grad():
        for checkpoint, vectors in enumerate(question.vectors):
            heads = vectors.flatten(0, 1).T
            for first in range(0, len(known), some):
                values = source.take(checkpoint, known[first : first + some].tolist())[..., question.columns]
                values = (values.sum(1) if values.dim() == 3 else values).to(vectors)
                found = (values @ heads).abs_().double().sum(0)
                energy[checkpoint] += found.view(queries, steps).sum(1).cpu()
    energy[:, torch.from_numpy(~question.valid)] = torch.nan
    return np.asarray(energy)
