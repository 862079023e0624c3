"""How far a ranking can be trusted: sketch noise, and what remains of it by halves of the columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stepinfluence.app.view.explore.answers import Explorer
from stepinfluence.app.view.explore.examples import number
from stepinfluence.app.view.explore.scored import What
from stepinfluence.search.noise import Halves, halves, standard_errors, why_no_errors, why_no_halves
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
    explorer: Explorer,
    row: int,
    *,
    k: int = 10,
    first: int = 1,
    last: int | None = None,
    parameters: str = "",
    score: str = "",
    checkpoint: int | None = None,
) -> dict[str, Any]:
    """One query's leading rows: the typical standard error of their scores, and how many lead by half the columns too.

    Raises:
        ValueError: as for :meth:`.Explorer.top`.
    """
    what = What(row, score, checkpoint, parameters)
    shown = explorer.leading_rows(what, k=k, first=first, last=last)

    def make() -> dict[str, Any]:
        question = _question(explorer, what, first, last)
        curvatures = explorer.curvatures(score)
        no_errors = why_no_errors(question.train, corrected=curvatures is not None)
        no_halves = why_no_halves(question.train, corrected=curvatures is not None)
        found: dict[str, Any] = {"noErrors": no_errors, "noHalves": no_halves, "noise": None, "sides": {}}
        squares = []
        for side in SIDES:
            rows = shown[side]
            asked = torch.tensor([rows], dtype=torch.int64).reshape(1, -1)
            entry: dict[str, Any] = {"rows": len(rows)}
            if not no_errors and rows:
                squares += [float(e) ** 2 for e in standard_errors(question, asked)[0][0]]
            if not no_halves and rows:
                one = _halves(explorer, question, what, side, len(rows), asked)
                entry["halves"] = [len({*rows} & {*half[0].tolist()}) for half in one.rows]
                if no_errors:  # the halves tell it, too
                    squares += [float(one.noise[0]) ** 2] * len(rows)
            found["sides"][side] = entry
        if squares:
            found["noise"] = number((sum(squares) / len(squares)) ** 0.5)
        return found

    return explorer.scored.kept("agreement", what, (k, first, last), make)


def _halves(explorer: Explorer, question: Question, what: What, side: str, k: int, rows: torch.Tensor) -> Halves:
    harmful = replace(question, harmful=side == "harmful")
    return halves(harmful, k, rows, curvature=explorer.curvatures(what.score))


def _question(explorer: Explorer, what: What, first: int, last: int | None) -> Question:
    """What is asked without curvature, ranked by some steps."""
    steps = explorer.steps(first, last)
    question = explorer.scored.question(what, corrected=False)
    return replace(question, ranked=tuple(range(steps.start, steps.stop)))
