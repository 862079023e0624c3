"""``sdi query``'s answer: the leading rows of each query with their trajectories, from stores or recomputed exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from stepinfluence.app.project import MapStyle, RowId
from stepinfluence.app.runs.answers import Answered, answers_of, read_answers
from stepinfluence.app.runs.curvatures import Correction, score_named
from stepinfluence.app.runs.stored import StoredRun
from stepinfluence.attribution.aggregation import OF_AN_EXAMPLE, Dominance, dominating, energy_shares, first_order_unit
from stepinfluence.attribution.curvature import Choice, Unrolled
from stepinfluence.attribution.features import Features
from stepinfluence.display.table import Hit
from stepinfluence.errors import StoreError
from stepinfluence.search import Question, TopK, ask, checkpoint_energy, two_stage
from stepinfluence.search.noise import NOT_REFITTED, halves, standard_errors, why_no_errors, why_no_halves
from stepinfluence.search.topk import best, best_rows
from stepinfluence.store import Store

CANDIDATES = 4
"""Rows that are recomputed exactly for each one that is wanted, unless told otherwise."""


@dataclass(frozen=True)
class Asked:
    """Queries: their features at the run's checkpoints, and what is known of them.

    Attributes:
        features: one per checkpoint.
        ids, texts: of the queries.
        examples: to recompute from.
        answered: what the model answers to each, and what is right.
    """

    features: list[Features]
    ids: tuple[RowId, ...]
    texts: tuple[str | None, ...]
    examples: Callable[[], MapStyle]
    answered: tuple[Answered, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """How far a ranking can be trusted.

    Attributes:
        noise: standard error of the hits' scores from sketching, root mean square; None where it is not known.
        errors: of each hit's score, at most; empty where they are not known one by one.
        halves: how many hits lead by the one and by the other half of the sketches' columns, too.
        unknown: why there is no noise, or why there are no halves, in words; empty if there are.
        exact: how many of the rows that lead by the sketches are among the hits, whose scores are exact; None for hits
            that are estimates.
    """

    noise: float | None = None
    errors: tuple[float, ...] = ()
    halves: tuple[int, int] | None = None
    unknown: str = ""
    exact: int | None = None


@dataclass(frozen=True)
class Answer:
    """The leading training rows of one query.

    Attributes:
        id, text: of the query.
        loss: the query's at the last checkpoint.
        hits: best first.
        checkpoints: names of the run's checkpoints.
        shares: of each, in the query's SDI energy (from the sketches, also where the hits are exact).
        dominance: the checkpoint that holds most of it, if one does.
        unit: of the influence.
        score: which score it is, in words.
        answered: what the model answers, and what is right.
        agreement: how far the ranking can be trusted.
    """

    id: RowId
    text: str | None
    loss: float
    hits: tuple[Hit, ...]
    checkpoints: tuple[str, ...]
    shares: tuple[float, ...]
    dominance: Dominance | None
    unit: str
    score: str
    answered: Answered
    agreement: Agreement


def ask_rows(run: StoredRun, store: Store, rows: Sequence[int]) -> Asked:
    """Queries that are rows of a store of the run.

    Raises:
        IndexError: no such row.
        StoreError: a row has no features, or its shard is missing.
    """
    failed = store.failed
    for row in rows:
        if not 0 <= row < len(store):
            there = f"rows 0 to {len(store) - 1}" if len(store) else "no rows"
            raise StoreError(f"row: got {row}; {store.path} has {there}")
        if row in failed:
            raise StoreError(f"row: {row} of {store.path} has no features: {failed[row]}")
    features = [store.features(k, rows=list(rows)) for k in range(len(store.checkpoints))]
    infos = [store.row(row) for row in rows]
    ids, texts = tuple(i.id for i in infos), tuple(i.text for i in infos)
    known = read_answers(store)
    answered = tuple(known.get(row, Answered()) for row in rows)
    return Asked(features, ids, texts, lambda: run.examples(store, rows), answered)


def ask_new(run: StoredRun, examples: Sequence[Any]) -> Asked:
    """Queries that are in no store: featurized now.

    Raises:
        StepInfluenceError: as for :meth:`StoredRun.new_features`.
    """
    project = run.prepared.project
    ids = tuple(project.example_id(example, k) for k, example in enumerate(examples))
    texts = tuple(project.text(example) for example in examples)
    features = run.new_features(examples)
    return Asked(features, ids, texts, lambda: examples, tuple(answers_of(run.prepared, examples)))


def answer(
    run: StoredRun,
    train: Store,
    asked: Asked,
    k: int,
    *,
    steps: range | None = None,
    harmful: bool = False,
    exact: bool = False,
    candidates: int | None = None,
    parameters: str | None = None,
    curvature: Correction | None = None,
    progress: bool = True,
) -> list[Answer]:
    """The k training rows that help (or harm) each query most.

    Args:
        steps: rank by the influence at these query steps (0-based) only.
        exact: recompute the influence of a short list without sketches, and rank by that.
        candidates: length of the short list; 4 k if not given.
        parameters: restrict influence to body parameters, ``*`` and ``?`` allowed.
        curvature: to correct influence with. With a Fisher and ``exact``, all training rows are recomputed, and
            corrected for the Fisher of their exact gradients.

    Raises:
        StepInfluenceError, ValueError: as for :func:`stepinfluence.search.top_k` and
            :func:`stepinfluence.search.two_stage`.
    """
    corrections: Choice = "none" if curvature is None else curvature
    question = ask(train, asked.features, steps=steps, harmful=harmful, parameters=parameters, curvature=corrections)
    survived: list[int] | None = None
    if exact:
        wanted = max(k, candidates if candidates is not None else CANDIDATES * k)
        both = two_stage(
            question, k, exact=run.recompute(train, asked.examples()), candidates=wanted, progress=progress
        )
        found, estimates = both.top, both.estimates
        before, _ = best_rows(question, found.rows.shape[1], progress=progress)
        survived = [_shared(a, b) for a, b in zip(before.tolist(), found.rows.tolist(), strict=True)]
    else:
        found, estimates = best(question, k, progress=progress), None
    energy = np.nan_to_num(checkpoint_energy(train, asked.features, parameters=parameters, curvature=corrections))
    score = score_named(curvature)
    names = tuple(checkpoint.name for checkpoint in train.checkpoints)
    unit = OF_AN_EXAMPLE if isinstance(curvature, Unrolled) else first_order_unit([c.eta for c in train.checkpoints])
    agreements = _agreements(train, asked, question, found, curvature, parameters, survived)
    answers = []
    for q, query_id in enumerate(asked.ids):
        hits = _hits(train, found, q, estimates)
        loss = float(asked.features[-1].losses[q])
        shares = tuple(energy_shares(energy[:, q]).tolist())
        owner = None if isinstance(curvature, Unrolled) else dominating(energy[:, q], names)
        said = asked.answered[q] if asked.answered else Answered()
        answers.append(
            Answer(query_id, asked.texts[q], loss, hits, names, shares, owner, unit, score, said, agreements[q])
        )
    return answers


def _agreements(
    train: Store,
    asked: Asked,
    question: Question,
    found: TopK,
    curvature: Correction | None,
    parameters: str | None,
    survived: list[int] | None,
) -> list[Agreement]:
    """How far each query's ranking can be trusted."""
    count = len(asked.ids)
    if survived is not None:
        return [Agreement(exact=kept) for kept in survived]
    plain = ask(train, asked.features, parameters=parameters)
    plain = replace(plain, ranked=question.ranked, harmful=question.harmful)
    no_errors = why_no_errors(plain.train, corrected=curvature is not None)
    no_halves = why_no_halves(plain.train, corrected=curvature is not None)
    if isinstance(curvature, Unrolled):
        no_halves, curvature = NOT_REFITTED, None
    errors = None if no_errors else standard_errors(plain, found.rows)[0]
    half = None if no_halves else halves(plain, found.rows.shape[1], found.rows, curvature=curvature)
    agreements = []
    for q in range(count):
        rows = found.rows[q].tolist()
        mine = () if errors is None else tuple(e for e, row in zip(errors[q].tolist(), rows, strict=True) if row >= 0)
        noise = None
        if mine:
            noise = float(np.sqrt(np.mean(np.square(mine))))
        elif half is not None and no_errors:  # the halves tell it, too
            noise = float(half.noise[q])
        kept = (
            None if half is None else (_shared(half.rows[0, q].tolist(), rows), _shared(half.rows[1, q].tolist(), rows))
        )
        unknown = no_halves or (no_errors if noise is None else "")
        agreements.append(Agreement(noise, mine, kept, unknown))
    return agreements


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """Rows that two rankings share."""
    return len({row for row in some if row >= 0} & {*others})


def _hits(train: Store, found: TopK, q: int, estimates: Tensor | None) -> tuple[Hit, ...]:
    hits = []
    for place, row in enumerate(found.rows[q].tolist()):
        if row < 0:
            continue
        info = train.row(row)
        estimate = None if estimates is None else float(estimates[q, place])
        score, trajectory = float(found.scores[q, place]), found.trajectory(q, place).numpy()
        hits.append(Hit(row, info.id, info.text, score, trajectory, estimate))
    return tuple(hits)
