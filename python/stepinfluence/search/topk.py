"""``top_k``: the training rows that help or harm each query most, by a scan of all rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.attribution.curvature import Choice, Damping
from stepinfluence.attribution.space import Parameters
from stepinfluence.progress import tqdm
from stepinfluence.search.question import Question, Steps, ask
from stepinfluence.search.ranking import NO_ROW, Ranking
from stepinfluence.search.scan import score_blocks
from stepinfluence.search.sources import Rows, RowSource

TRAJECTORY_BYTES = 64 << 20
"""Decoded rows that are held at a time when the winners' trajectories are computed."""


@dataclass(frozen=True)
class TopK:
    """The k best training rows of each of Q queries (and of each ranked step), best first.

    Attributes:
        rows: ``(Q, k)`` int64, or ``(Q, len(ranked), k)`` where each step was ranked for itself. -1 where there are
            fewer rows than k, and for queries without features.
        scores: same shape, float32: what rows were ranked by; NaN where the row is -1.
        sdi: ``(Q, k, S)``, or ``(Q, len(ranked), k, S)``: influence of each of these rows by all S steps of the query
            (S = 1 for queries that are summed over steps). A score is the sum over the ranked steps.
        train_ids: ids, an object array of the shape of ``rows``; None where the row is -1.
        query_ids: ids of the queries.
        ranked: the query steps that the ranking is by, 0-based.
        per_step: whether each of these was ranked for itself.
        harmful: whether the most harmful rows were asked for (smallest scores first).
        etas: weight of each checkpoint.
        lengths: ``(Q,)`` int64: the last step (1-based) that each query's loss depends on; ``sdi`` is zero beyond it.
            None where the queries do not tell.
    """

    rows: Tensor
    scores: Tensor
    sdi: Tensor
    train_ids: npt.NDArray[np.object_]
    query_ids: tuple[Hashable, ...]
    ranked: tuple[int, ...]
    per_step: bool
    harmful: bool
    etas: tuple[float, ...]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def trajectory(self, query: int, *place: int) -> Tensor:
        """``(steps,)``: influence of one of a query's rows by the steps that the query took, at least one."""
        steps = None if self.lengths is None else max(1, int(self.lengths[query]))
        return self.sdi[(query, *place)][:steps]

    @property
    def k(self) -> int:
        return self.rows.shape[-1]

    @classmethod
    def of(
        cls,
        question: Question,
        rows: Tensor,
        scores: Tensor,
        sdi: Tensor,
        ranked: tuple[int, ...] | None = None,
    ) -> TopK:
        """The answer to a question, in the terms of the question (``ranked`` if by other steps than the question's)."""
        return cls(
            rows=rows,
            scores=scores.float(),
            sdi=sdi,
            train_ids=_ids_of(question.train, rows),
            query_ids=question.query_ids,
            ranked=question.ranked if ranked is None else ranked,
            per_step=question.per_step,
            harmful=question.harmful,
            etas=question.etas,
            lengths=question.lengths(),
        )


def top_k(
    train: Rows,
    query: Rows,
    k: int = 10,
    *,
    per_step: bool = False,
    harmful: bool = False,
    etas: float | Sequence[float] | None = None,
    parameters: Parameters = None,
    steps: Steps = None,
    curvature: Choice = "none",
    damping: Damping | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TopK:
    """The k training rows with the largest (or smallest) influence on each query, summed over checkpoints (eq. 5).

    All rows are read once, block by block; memory is bounded whatever their number (``Q * S * D`` numbers of queries,
    ``Q * k`` winners, some tens of MiB of blocks). Of rows with equal scores the lowest row number comes first. Rows
    that failed, and scores that are not finite, are never returned.

    Args:
        train: the rows to search: a store, features, or a list of features, one per checkpoint; per step or summed.
        query: the queries, likewise; per step for trajectories.
        k: how many; at most as many as there are rows.
        per_step: rank by the influence at each query step, rather than by its sum over steps.
        harmful: the smallest scores instead of the largest.
        etas: weight of each checkpoint; the store's if not given (1 for features).
        parameters: restrict influence to body parameters: a name or several, ``*`` and ``?`` allowed.
        steps: restrict the ranking to query steps (0-based): one, a slice or a range.
        curvature, damping: as for :func:`stepinfluence.influence`: the queries are transformed once, the rows stay as
            they are, and the parts of the score by parameter still add up to the whole.
        device: where to compute; a GPU if there is one for stores, else where the features are.
        progress: show a progress bar on work of over two seconds.

    Raises:
        FeatureMismatchError: features of different sketches, parameters, weights or examples (says what differs).
        StoreError: a store is incomplete or damaged.
        ValueError, TypeError: an argument is none of those above.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}; give a positive number of rows")
    question = ask(
        train,
        query,
        per_step=per_step,
        harmful=harmful,
        etas=etas,
        parameters=parameters,
        steps=steps,
        curvature=curvature,
        damping=damping,
        device=device,
    )
    return best(question, k, progress=progress)


def best(question: Question, k: int, *, progress: bool = False) -> TopK:
    """:func:`top_k` of a question that has been asked already."""
    rows, scores = best_rows(question, k, progress=progress)
    return TopK.of(question, rows, scores, trajectories(question, rows))


def best_rows(question: Question, k: int, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Rows and scores of the k best of each ranking by a scan of all rows: ``(Q, k)`` or ``(Q, len(ranked), k)``, fewer
    where there are fewer rows; queries without features have none."""
    heads = question.heads()
    k = min(k, int(question.train.valid.sum()))
    ranking = Ranking(len(heads[0]), max(1, k), smallest=question.harmful, dtype=heads[0].dtype, device=question.device)
    with (
        torch.no_grad(),
        tqdm(total=len(question.train), desc="scan", unit="row", delay=2, disable=not progress) as bar,
    ):
        for block in score_blocks(question, heads):
            ranking.add(block)
            bar.update(len(block))
    rows, scores = ranking.result()
    shape = (len(question.query_ids), len(question.ranked), k) if question.per_step else (len(question.query_ids), k)
    rows, scores = rows[:, :k].reshape(shape), scores[:, :k].reshape(shape)
    silent = torch.from_numpy(~question.valid)
    rows[silent], scores[silent] = NO_ROW, torch.nan
    return rows, scores


def trajectories(question: Question, rows: Tensor) -> Tensor:
    """``(*rows.shape, S)`` float32: influence of rows ``(Q, ...)`` on their query at each of its steps."""
    train = question.train
    out = torch.full((rows.numel(), question.steps), torch.nan)
    flat = rows.flatten()
    places = (flat != NO_ROW).nonzero().flatten()
    query_of = places // max(1, rows[0].numel() if len(rows) else 1)
    width = train.spaces[0].width * (question.steps if train.per_step else 1)
    for some, queries in zip(
        *(t.split(max(1, TRAJECTORY_BYTES // (4 * width))) for t in (places, query_of)), strict=True
    ):
        wanted, which = flat[some].unique(return_inverse=True)
        if not len(wanted):
            continue
        for checkpoint in question.counted:
            vectors = question.vectors[checkpoint]
            values = train.take(checkpoint, wanted.tolist())[..., question.columns].to(vectors)
            values = values.sum(1) if values.dim() == 3 else values
            for query in queries.unique().tolist():
                mine = queries == query
                term = (values[which[mine].to(values.device)] @ vectors[query].T).float().cpu()
                out[some[mine]] = term if checkpoint == question.counted[0] else out[some[mine]] + term
    return out.reshape(*rows.shape, question.steps)


def _ids_of(train: RowSource, rows: Tensor) -> npt.NDArray[np.object_]:
    """Ids of rows, an object array of the same shape; None for no row."""
    ids = np.full(rows.shape, None, dtype=object)
    known = {row: train.id_of(row) for row in rows.unique().tolist() if row != NO_ROW}
    for place, row in np.ndenumerate(rows.numpy()):
        ids[place] = known.get(int(row))
    return ids
