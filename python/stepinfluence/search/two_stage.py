"""Candidates from sketches, then their exact influence, recomputed from the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from stepinfluence.attribution.visiting import visit_checkpoints
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.search.index import Index
from stepinfluence.search.question import Question
from stepinfluence.search.ranking import NO_ROW, Ranking
from stepinfluence.search.recompute import Batches, Recompute, RowCheck
from stepinfluence.search.rerank import exact_blocks
from stepinfluence.search.topk import TopK, best_rows, trajectories
from stepinfluence.store import checkpoint_of


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
        question: from :func:`ask`.
        k: rows per query.
        exact: what their exact influence is recomputed from.
        candidates: how many rows each ranking hands to the exact stage.
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
    if index is None:
        found, _ = best_rows(question, candidates, progress=progress)
    else:
        if index.source.spaces != question.train.spaces or len(index.source) != len(question.train):
            raise FeatureMismatchError("index: of other rows than train's; open or build it with the same store")
        found = index.candidates(question, candidates)
    lists = _per_query(found, question)
    middle = time.perf_counter()
    top = _ranked(question, lists, _exact_sdi(question, lists, exact, progress=progress), k)
    estimates = _scores(trajectories(question, top.rows), question.ranked, per_step=question.per_step)
    return TwoStage(top, estimates, lists, {"candidates": middle - began, "exact": time.perf_counter() - middle})


def exact_rows(question: Question, rows: Tensor, *, exact: Recompute, progress: bool = True) -> Tensor:
    """Exact influence of given rows on each query, recomputed from the model.

    Args:
        question: from :func:`ask`; its steps and ``k`` play no part.
        rows: ``(Q, n)`` int64, ascending within a query and each once, padded with -1 at the end.
        exact, progress: as for :func:`two_stage`.

    Returns:
        ``(Q, n, steps)`` float32, summed over the checkpoints that have a weight; zero where a row is -1.

    Raises:
        FeatureMismatchError, ValueError: as for :func:`two_stage`.
    """
    _require_same(question, exact)
    return _exact_sdi(question, rows, exact, progress=progress)


def _require_same(question: Question, exact: Recompute) -> None:
    """Raise unless exact influence can answer a question, and its examples are as many as the features are of."""
    if question.corrected:
        raise ValueError("question: exact influence is recomputed without curvature; ask with curvature='none'")
    for name, data, want in (
        ("train", exact.train, len(question.train)),
        ("query", exact.query, len(question.query_ids)),
    ):
        if len(data) != want:
            raise ValueError(f"{name}: got {len(data)} examples for {want} rows of features; give the same dataset")


# ----------------------------------------------------------------------------------------------------------------
# Candidates


def _per_query(found: Tensor, question: Question) -> Tensor:
    """Rows by query, those of all its steps together: ``(Q, n)`` ascending, padded with -1."""
    groups = found.reshape(len(question.query_ids), -1).tolist()
    unique = [sorted(set(group) - {NO_ROW}) if good else [] for group, good in zip(groups, question.valid, strict=True)]
    longest = max((len(u) for u in unique), default=0)
    return torch.tensor([u + [NO_ROW] * (longest - len(u)) for u in unique], dtype=torch.int64).reshape(-1, longest)


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


def _exact_sdi(question: Question, lists: Tensor, exact: Recompute, *, progress: bool) -> Tensor:
    """``(*lists.shape, steps)``: each query's exact influence of its candidates, summed over checkpoints."""
    train, pairs = question.train, _Pairs(lists, question)
    weights = question.etas if train.folded is None else tuple(part.eta for part in train.folded.parts)
    sdi = torch.zeros(*lists.shape, question.steps)
    checks = [
        RowCheck("train", train, pairs.rows, exact, folded=train.folded),
        RowCheck("query", question.query, pairs.queries, exact, folded=train.folded),
    ]
    visits = visit_checkpoints(exact.capture, exact.checkpoints, weights, exact.metric, reader=exact.reader)
    with closing(visits) as visited:
        for checkpoint, eta in enumerate(visited):
            if train.folded is None and not eta:
                continue
            _require_weights(question, exact, checkpoint)
            for check in checks:
                check.visit(checkpoint)
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


def _require_weights(question: Question, exact: Recompute, checkpoint: int) -> None:
    """Raise unless the model has the weights, and the metric, that the features were computed with."""
    train, present = question.train, checkpoint_of(exact.capture, "present", 1.0).space
    space = train.spaces[checkpoint if train.folded is None else 0]
    wanted = space if train.folded is None else train.folded.parts[checkpoint]
    # Features in memory do not tell the weights outside of the body.
    if wanted.weights != present.weights or wanted.model_weights not in ("", present.model_weights):
        if exact.checkpoints is None:
            raise FeatureMismatchError(
                f"capture: its model does not have the weights of checkpoint {checkpoint} of the features; "
                "load that checkpoint, or pass checkpoints="
            )
        raise FeatureMismatchError(
            f"checkpoints: {exact.checkpoints[checkpoint]} does not hold the weights of checkpoint {checkpoint} of the "
            "features; give the same files in the same order, or featurize again"
        )
    if train.folded is None and space.metric != present.metric:
        raise FeatureMismatchError(
            "capture: another optimizer metric than the features'; attach with the same preconditioner"
        )


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
