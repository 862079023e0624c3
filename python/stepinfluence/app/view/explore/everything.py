"""All queries at once: which training examples matter to them together, and which queries one example matters to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.examples import MOST_ROWS
from stepinfluence.app.view.explore.scored import ALIKE, What, leading
from stepinfluence.attribution.curvature import Unrolled


def overall(
    explorer: Explorer,
    *,
    k: int = 20,
    first: int = 1,
    last: int | None = None,
    parameters: str = "",
    score: str = "",
    checkpoint: int | None = None,
    weights: str = ALIKE,
) -> dict[str, Any]:
    """The training examples that help and harm all queries together most, by influence in steps ``first..last``.

    One scan of the training rows, as influence is linear in the query: ``weights`` as for
    :class:`~stepinfluence.app.view.explore.scored.What`. Of many queries some stand for all (``queries`` ``of``).
    """
    what = What(None, score, checkpoint, parameters, weights)
    found = explorer.ranked(what, k=k, first=first, last=last)
    there = len(explorer.query) - len(explorer.sides["query"].failed)
    return {**found, "profile": explorer.profile(what), "queries": len(explorer.scored.counted), "of": there}


def reverse(
    explorer: Explorer, row: int, *, k: int = 10, score: str = "", checkpoint: int | None = None
) -> dict[str, Any]:
    """One training example: the queries that it helps and harms most, by step, and how many there are of each.

    Raises:
        ValueError: no such row, score or checkpoint, or the example has no features.
    """
    if not 1 <= k <= MOST_ROWS:
        raise ValueError(f"k: got {k}; use 1 to {MOST_ROWS}")
    side = explorer.sides["train"]
    side.require(row)
    if row in side.failed:
        raise ValueError(f"train {row}: has no features ({side.failed[row]})")
    # Not a query, but as good a key of what is kept: the score and the checkpoint belong to it alike.
    what = What(None, score, checkpoint)
    scores = explorer.scored.kept("reverse", what, row, lambda: _on_queries(explorer, row, score, checkpoint))
    values = scores.sum(1)
    sides = {
        "helpful": [r for r in leading(values, k) if values[r] > 0],
        "harmful": [r for r in leading(values, k, smallest=True) if values[r] < 0],
    }
    queries = explorer.sides["query"]
    return {
        **{
            name: [
                {**queries.short(r), "score": float(values[r]), "sdi": scores[r][explorer.taken(r)].tolist()}
                for r in rows
            ]
            for name, rows in sides.items()
        },
        "helps": int((values > 0).sum()),
        "harms": int((values < 0).sum()),
        "signed": np.nansum(scores, 0).tolist(),
        "energy": np.nansum(np.abs(scores), 0).tolist(),
    }


def _on_queries(explorer: Explorer, row: int, score: str, checkpoint: int | None) -> npt.NDArray[np.float32]:
    """``(n_query, steps)``: influence of one training row on every query; NaN for queries that failed.

    The training row is corrected for curvature instead of the queries: the correction is symmetric. With SOURCE it is
    followed to the end of training instead of the queries being carried back.
    """
    curvatures = explorer.curvatures(score)
    if isinstance(curvatures, Unrolled):
        return _at_the_end(explorer, curvatures, row, explorer.scored.etas(checkpoint, score))
    found = np.zeros((len(explorer.query), explorer.query.steps), np.float32)
    for k, eta in enumerate(explorer.scored.etas(checkpoint, score)):
        if not eta:
            continue
        values = explorer.train.features(k, [row]).values[0]
        summed = (values.sum(0) if values.dim() == 2 else values) * eta
        if curvatures is not None:
            summed = curvatures[k].solve(summed.unsqueeze(0)).squeeze(0)
        with torch.no_grad():
            for start, block in explorer.query.blocks(k):
                found[start : start + len(block)] += (block.float() @ summed.float()).numpy()
    found[list(explorer.sides["query"].failed)] = np.nan
    return found


def _at_the_end(explorer: Explorer, unrolled: Unrolled, row: int, etas: Sequence[float]) -> npt.NDArray[np.float32]:
    rows = []
    for k, eta in enumerate(etas):
        values = explorer.train.features(k, [row]).values
        rows.append((values.sum(1) if values.dim() == 3 else values) * eta)
    there = unrolled.gathered(rows)[0].float()
    found = np.zeros((len(explorer.query), explorer.query.steps), np.float32)
    with torch.no_grad():
        for start, block in explorer.query.blocks(len(etas) - 1):
            found[start : start + len(block)] = (block.float() @ there).numpy()
    found[list(explorer.sides["query"].failed)] = np.nan
    return found
