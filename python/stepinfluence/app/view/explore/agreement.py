"""How far a ranking can be trusted: sketch noise, and what remains of it by halves of the columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.examples import number
from stepinfluence.app.view.explore.scored import What, leading
from stepinfluence.attribution.curvature import Unrolled
from stepinfluence.search.noise import NOT_REFITTED, half_scores, standard_errors, why_no_errors, why_no_halves
from stepinfluence.search.question import Question

SIDES = ("helpful", "harmful")


def errors(
    explorer: Explorer, what: What, rows: list[int], *, first: int = 1, last: int | None = None
) -> dict[int, tuple[float, list[float]]]:
    """Standard errors, at most, of some rows' scores and of their influence by step; empty where there are none."""
    question = _question(explorer, what, first, last)
    corrected = explorer.curvatures(what.score) is not None
    if not rows or why_no_errors(question.train, corrected=corrected):
        return {}
    whole, by_step = standard_errors(question, torch.tensor([rows]))
    return {row: (float(whole[0, k]), by_step[0, k].tolist()) for k, row in enumerate(rows)}


def agreement(
    explorer: Explorer, what: What, *, k: int = 10, first: int = 1, last: int | None = None
) -> dict[str, Any]:
    """One query's leading rows: the typical standard error of their scores, and how many lead by half the columns too.

    Raises:
        ValueError: as for :meth:`.Explorer.top`.
    """
    shown = explorer.leading_rows(what, k=k, first=first, last=last)

    def make() -> dict[str, Any]:
        question = _question(explorer, what, first, last)
        curvatures = explorer.curvatures(what.score)
        no_errors = why_no_errors(question.train, corrected=curvatures is not None)
        no_halves = why_no_halves(question.train, corrected=curvatures is not None)
        if isinstance(curvatures, Unrolled):
            no_halves, curvatures = NOT_REFITTED, None
        found: dict[str, Any] = {"noErrors": no_errors, "noHalves": no_halves, "noise": None, "sides": {}}
        squares: list[float] = []
        both = None if no_halves else half_scores(question, curvature=curvatures)[:, :, 0].numpy()
        for side in SIDES:
            rows = shown[side]
            entry: dict[str, Any] = {"rows": len(rows)}
            if rows and not no_errors:
                squares += [float(e) ** 2 for e in standard_errors(question, torch.tensor([rows]))[0][0]]
            if rows and both is not None:
                kept = [leading(half, len(rows), smallest=side == "harmful") for half in both]
                entry["halves"] = [len({*rows} & {*some}) for some in kept]
                if no_errors:  # the halves tell it, too
                    apart = ((both[0, rows] - both[1, rows]) / 2).astype(np.float64)
                    squares += np.square(apart).tolist()
            found["sides"][side] = entry
        if squares:
            found["noise"] = number((sum(squares) / len(squares)) ** 0.5)
        return found

    return explorer.scored.kept("agreement", what, (k, first, last), make)


def _question(explorer: Explorer, what: What, first: int, last: int | None) -> Question:
    """What is asked without curvature, ranked by some steps."""
    steps = explorer.steps(first, last)
    question = explorer.scored.question(what, corrected=False)
    return replace(question, ranked=tuple(range(steps.start, steps.stop)))
