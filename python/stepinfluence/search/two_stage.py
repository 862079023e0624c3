"""Candidates from sketches, then their exact influence, recomputed from the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from stepinfluence.errors import FeatureMismatchError
from stepinfluence.search.exact_corrected import corrected_scores, require_correctable
from stepinfluence.search.index import Index
from stepinfluence.search.question import Question
from stepinfluence.search.ranking import NO_ROW, Ranking
from stepinfluence.search.recompute import Batches, Recompute, visited
from stepinfluence.search.rerank import exact_blocks
from stepinfluence.search.topk import TopK, best_rows, trajectories


@dataclass(frozen=True)
class TwoStage:
    """What a two-stage search found.

    Attributes:
        top: the winners by exact influence; scores and trajectories are exact.
        estimates: of the shape of ``top.scores``: what the features say of the same rows.
        candidates: ``(Q, n)`` int64: the rows that were recomputed for each query, ascending; padded with -1.
        seconds: of the stages: ``"candidates"`` and ``"exact"``.
    """

    top: TopK
    estimates: Tensor
    candidates: Tensor
    seconds: Mapping[str, float]


def two_stage(
    question: Question,
    k: int = 10,
    *,
    exact: Recompute,
    candidates: int = 100,
    index: Index | None = None,
    progress: bool = True,
) -> TwoStage:
    """The k best rows of each query by exact influence, among candidates found on sketches.

    Args:
        question: from :func:`ask`. With a curvature, exact scores are corrected for the exact gradients' own Fisher
            at the damping of the sketches' (:func:`.exact_corrected.corrected_scores`).
        k: rows per query.
        exact: what their exact influence is recomputed from.
        candidates: how many rows each ranking hands to the exact stage; all of them with a curvature.
        index: where candidates come from; an exact scan of all rows if not given.
        progress: show progress bars on work of over two seconds.

    Returns:
        :class:`TwoStage`. Where the queries' features are summed over steps, the trajectories have the model's steps.

    Raises:
        FeatureMismatchError: features computed at other weights or under another metric than the model's.
        ValueError, TypeError: an argument is none of those above. Errors of :func:`rerank` and of checkpoints pass
            through.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}; give a positive number of rows")
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < k:
        raise ValueError(f"candidates: got {candidates!r} for k = {k}; give at least k")
    _require_same(question, exact)
    began = time.perf_counter()
    lists = _candidates(question, candidates, index, progress=progress)
    middle = time.perf_counter()
    top = _ranked(question, lists, _exact(question, lists, exact, progress=progress), k)
    estimates = _scores(trajectories(question, top.rows), question.ranked, per_step=question.per_step)
    return TwoStage(top, estimates, lists, {"candidates": middle - began, "exact": time.perf_counter() - middle})


def exact_rows(question: Question, rows: Tensor, *, exact: Recompute, progress: bool = True) -> Tensor:
    """Exact influence of given rows on each query, recomputed from the model.

    Args:
        question: from :func:`ask`; its steps and ``k`` play no part. With a curvature all rows are recomputed.
        rows: ``(Q, n)`` int64, ascending within a query and each once, padded with -1 at the end.
        exact, progress: as for :func:`two_stage`.

    Returns:
        ``(Q, n, steps)`` float32, summed over the checkpoints that have a weight; zero where a row is -1.

    Raises:
        FeatureMismatchError, ValueError: as for :func:`two_stage`.
    """
    _require_same(question, exact)
    return _exact(question, rows, exact, progress=progress)


def _require_same(question: Question, exact: Recompute) -> None:
    """Raise unless exact influence can answer a question, and its examples are as many as the features are of."""
    if question.corrected:
        require_correctable(question)
    if not question.train.valid.any():
        raise ValueError("train: has no rows with features; there is nothing to recompute")
    for name, data, want in (
        ("train", exact.train, len(question.train)),
        ("query", exact.query, len(question.query_ids)),
    ):
        if len(data) != want:
            raise ValueError(f"{name}: got {len(data)} examples for {want} rows of features; give the same dataset")


# ----------------------------------------------------------------------------------------------------------------
# Candidates


def _candidates(question: Question, count: int, index: Index | None, *, progress: bool) -> Tensor:
    """Rows by query, ``(Q, n)`` as for :func:`exact_rows`."""
    if question.corrected:  # what corrects a score is of all rows, so all of them are recomputed
        rows = torch.from_numpy(question.train.valid.nonzero()[0])
        lists = rows.repeat(len(question.query_ids), 1)
        return lists.masked_fill(~torch.from_numpy(question.valid).unsqueeze(1), NO_ROW)
    if index is None:
        found, _ = best_rows(question, count, progress=progress)
    else:
        if index.source.spaces != question.train.spaces or len(index.source) != len(question.train):
            raise FeatureMismatchError("index: of other rows than train's; open or build it with the same store")
        found = index.candidates(question, count)
    return _per_query(found, question)


def _per_query(found: Tensor, question: Question) -> Tensor:
    """Rows by query, those of all its steps together: ``(Q, n)`` ascending, padded with -1."""
    groups = found.reshape(len(question.query_ids), -1).tolist()
    unique = [sorted(set(group) - {NO_ROW}) if good else [] for group, good in zip(groups, question.valid, strict=True)]
    longest = max((len(u) for u in unique), default=0)
    padded = [u + [NO_ROW] * (longest - len(u)) for u in unique]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(unique), longest)


class _Pairs:
    """Which pairs of rows and queries are candidates, by their positions in two short lists.

    Attributes:
        rows: the rows that are recomputed, ascending.
        queries: the queries that have features.
    """

    def __init__(self, lists: Tensor, question: Question) -> None:
        self.rows = lists[lists != NO_ROW].unique()
        self.queries = torch.from_numpy(question.valid.nonzero()[0])
        mine = lists[self.queries]
        # Where each candidate lies among the rows; beyond them where there is none.
        self._places = torch.searchsorted(self.rows, mine).masked_fill(mine == NO_ROW, len(self.rows))

    def within(self, rows: range, queries: range) -> tuple[Tensor, Tensor, Tensor]:
        """Row, query and slot in the query's list of the candidates in a block; rows and queries count from its
        first."""
        places = self._places[queries.start : queries.stop]
        query, slot = ((places >= rows.start) & (places < rows.stop)).nonzero(as_tuple=True)
        return places[query, slot] - rows.start, query, slot

    def mask(self, rows: range, queries: range) -> Tensor:
        """``(len(rows), len(queries))`` bool."""
        wanted = torch.zeros(len(rows), len(queries), dtype=torch.bool)
        row, query, _ = self.within(rows, queries)
        wanted[row, query] = True
        return wanted


# ----------------------------------------------------------------------------------------------------------------
# Their exact influence


def _exact(question: Question, lists: Tensor, exact: Recompute, *, progress: bool) -> Tensor:
    """``(*lists.shape, steps)``: exact scores, with the question's curvature."""
    if not question.corrected:
        return _exact_sdi(question, lists, exact, progress=progress)
    scores = corrected_scores(question, exact, progress=progress)
    return scores[torch.arange(len(lists)).unsqueeze(1), lists.clamp(min=0)].masked_fill(
        (lists == NO_ROW)[..., None], 0
    )


def _exact_sdi(question: Question, lists: Tensor, exact: Recompute, *, progress: bool) -> Tensor:
    """``(*lists.shape, steps)``: each query's exact influence of its candidates, summed over checkpoints."""
    pairs = _Pairs(lists, question)
    sdi = torch.zeros(*lists.shape, question.steps)
    with closing(visited(question, pairs.rows, pairs.queries, exact)) as checkpoints:
        for _, eta in checkpoints:
            blocks = exact_blocks(
                exact.capture,
                exact.loss_fn,
                Batches(exact.train, pairs.rows, exact),
                Batches(exact.query, pairs.queries, exact),
                wanted=pairs.mask,
                parameters=question.parameters,
                route=exact.route,
                query_bytes=exact.query_bytes,
                progress=progress,
            )
            with closing(blocks):
                for block in blocks:
                    row, query, slot = pairs.within(block.rows, block.queries)
                    more = block.sdi.shape[2] - sdi.shape[2]  # queries summed over steps do not tell how many
                    sdi = torch.nn.functional.pad(sdi, (0, max(0, more)))
                    values = block.sdi.float().cpu() * eta
                    sdi[pairs.queries[block.queries.start + query], slot, : values.shape[2]] += values[row, query]
    return sdi


# ----------------------------------------------------------------------------------------------------------------
# The winners


def _scores(sdi: Tensor, ranked: Sequence[int], *, per_step: bool) -> Tensor:
    """What rows are ranked by: ``(..., k)`` of ``(..., k, steps)``; with ``per_step`` ``(Q, ranked, k)`` of
    ``(Q, ranked, k, steps)``."""
    chosen = sdi[..., list(ranked)]
    return chosen.diagonal(dim1=1, dim2=3).transpose(1, 2) if per_step else chosen.sum(-1)


def _ranked(question: Question, lists: Tensor, sdi: Tensor, k: int) -> TopK:
    """The k best of each query's candidates by exact influence."""
    k = min(k, int(question.train.valid.sum()))
    ranked = tuple(range(sdi.shape[2])) if question.summed else question.ranked
    chosen = sdi[..., list(ranked)]
    values = chosen if question.per_step else chosen.sum(2, keepdim=True)
    values = values.masked_fill((lists == NO_ROW).unsqueeze(-1), torch.nan)
    count = len(lists) * values.shape[2]
    ranking = Ranking(count, max(1, k), smallest=question.harmful, dtype=sdi.dtype, device=sdi.device)
    # Candidates are in ascending order of rows, so that the lowest row wins a tie here, too.
    ranking.add(values.permute(1, 0, 2).flatten(1))
    slots, scores = (t[:, :k].reshape(len(lists), -1, k) for t in ranking.result())
    missing = slots == NO_ROW
    query = torch.arange(len(lists)).view(-1, 1, 1).expand_as(slots)
    if lists.shape[1]:
        at = slots.clamp(min=0)
        rows = lists[query, at].masked_fill(missing, NO_ROW)
        paths = sdi[query, at].masked_fill(missing.unsqueeze(-1), torch.nan)
    else:
        rows, paths = slots, torch.full((*slots.shape, sdi.shape[2]), torch.nan)
    if not question.per_step:
        rows, scores, paths = rows[:, 0], scores[:, 0], paths[:, 0]
    return TopK.of(question, rows, scores, paths, ranked)
