"""Candidates from sketches, then their exact influence, recomputed from the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from stepinfluence.attribution.checkpoints import PathLike
from stepinfluence.attribution.scoring import Metric, visit_checkpoints
from stepinfluence.capture import Capture
from stepinfluence.capture.pairs import PairRoute
from stepinfluence.capture.session import LossFn
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.search.index import Index
from stepinfluence.search.question import Parameters, Question, Steps, ask
from stepinfluence.search.ranking import NO_ROW, Ranking
from stepinfluence.search.rerank import QUERY_BYTES, exact_blocks
from stepinfluence.search.sources import Rows
from stepinfluence.search.topk import TopK, ids_of, scanned
from stepinfluence.store import Store


class Dataset(Protocol):
    """A map-style dataset: position ``r`` is row ``r`` of the features."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class TwoStage:
    """What a two-stage search found.

    Attributes:
        top: the winners by exact influence; scores and trajectories are exact.
        candidates: ``(Q, n)`` int64: the rows that were recomputed for each query, ascending; padded with -1.
        seconds: of the stages: ``"candidates"`` and ``"exact"``.
    """

    top: TopK
    candidates: Tensor
    seconds: Mapping[str, float]


class _Batches:
    """Batches of some examples of a dataset, the same each time they are iterated."""

    def __init__(self, data: Dataset, rows: Sequence[int], size: int, collate: Callable[[list[Any]], Any]) -> None:
        self._data, self._rows, self._size, self._collate = data, rows, size, collate

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self._rows), self._size):
            yield self._collate([self._data[row] for row in self._rows[start : start + self._size]])


def two_stage(
    train: Rows,
    query: Rows,
    k: int = 10,
    *,
    capture: Capture,
    loss_fn: LossFn,
    train_examples: Dataset,
    query_examples: Dataset,
    candidates: int = 100,
    index: Index | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    batch_size: int = 16,
    per_step: bool = False,
    harmful: bool = False,
    etas: float | Sequence[float] | None = None,
    parameters: Parameters = None,
    steps: Steps = None,
    checkpoints: Sequence[PathLike] | None = None,
    metric: Metric | None = None,
    route: PairRoute = "auto",
    query_bytes: int = QUERY_BYTES,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TwoStage:
    """The k best rows of each query by exact influence, among candidates found on sketches.

    Args:
        train, query, k, per_step, harmful, etas, parameters, steps, device, progress: as for :func:`top_k`.
        capture, loss_fn, route, query_bytes: as for :func:`rerank`.
        train_examples, query_examples: the examples: position ``r`` is row ``r`` of ``train`` and of ``query``.
        candidates: how many rows each ranking hands to the exact stage.
        index: where candidates come from; an exact scan of all rows if not given.
        collate: makes a batch of a list of examples.
        batch_size: examples per batch.
        checkpoints: files of the checkpoints that the features were computed at, in their order; not needed where the
            model has the weights of the only one.
        metric: as for :func:`stepinfluence.influence_over_checkpoints`.

    Returns:
        :class:`TwoStage`.

    Raises:
        FeatureMismatchError: features that cannot be compared, or computed at other weights than the model's.
        ValueError, TypeError: an argument is none of those above. Errors of :func:`rerank` and of checkpoints pass
            through.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < k:
        raise ValueError(f"candidates: got {candidates!r} for k = {k}; give at least k")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; give a positive number")
    question = ask(train, query, per_step=per_step, etas=etas, parameters=parameters, steps=steps, device=device)
    for name, data, want in (
        ("train_examples", train_examples, len(question.train)),
        ("query_examples", query_examples, len(question.query_ids)),
    ):
        if len(data) != want:
            raise ValueError(f"{name}: got {len(data)} examples for {want} rows of features; give the same dataset")
    began = time.perf_counter()
    if index is None:
        found, _ = scanned(question, candidates, harmful=harmful, progress=progress)
    else:
        if index.source.spaces != question.train.spaces or len(index.source) != len(question.train):
            raise FeatureMismatchError("index: of other rows than train's; open or build it with the same store")
        found = index.candidates(question, candidates, harmful=harmful)
    lists = _per_query(found, question)
    middle = time.perf_counter()
    sdi = torch.zeros(*lists.shape, question.steps)
    rows = lists[lists != NO_ROW].unique()
    queries = torch.from_numpy(question.valid.nonzero()[0])
    # Where each candidate lies among the rows that are recomputed; beyond them where there is none.
    places = torch.searchsorted(rows, lists[queries]).masked_fill(lists[queries] == NO_ROW, len(rows))
    fold = train.manifest.fold if isinstance(train, Store) else None
    weights = question.etas if fold is None else tuple(part["eta"] for part in fold["checkpoints"])
    with closing(visit_checkpoints(capture, checkpoints, weights, metric)) as visited:
        for checkpoint, eta in enumerate(visited):
            space = question.train.spaces[checkpoint if fold is None else 0]
            stored = space.weights if fold is None else fold["checkpoints"][checkpoint]["weights"]
            _require_weights(stored, space.metric if fold is None else None, capture, checkpoint)
            with closing(
                exact_blocks(
                    capture,
                    loss_fn,
                    _Batches(train_examples, rows.tolist(), batch_size, collate),
                    _Batches(query_examples, queries.tolist(), batch_size, collate),
                    wanted=lambda r, q: _wanted(places, r, q),
                    parameters=parameters,
                    route=route,
                    query_bytes=query_bytes,
                    progress=progress,
                )
            ) as blocks:
                for block in blocks:
                    column, slot = _within(places, block.rows, block.queries)
                    values = block.sdi.float().cpu() * eta
                    found = values[places[block.queries.start + column, slot] - block.rows.start, column]
                    sdi[queries[block.queries.start + column], slot, : values.shape[2]] += found
    top = _ranked(question, lists, sdi, min(k, int(question.train.valid.sum())), harmful=harmful)
    return TwoStage(top, lists, {"candidates": middle - began, "exact": time.perf_counter() - middle})


def _per_query(found: Tensor, question: Question) -> Tensor:
    """Rows by query, those of all its steps together: ``(Q, n)`` ascending, padded with -1."""
    groups = found.reshape(len(question.query_ids), -1).tolist()
    unique = [sorted(set(group) - {NO_ROW}) if good else [] for group, good in zip(groups, question.valid, strict=True)]
    longest = max((len(u) for u in unique), default=0)
    return torch.tensor([u + [NO_ROW] * (longest - len(u)) for u in unique], dtype=torch.int64).reshape(-1, longest)


def _within(places: Tensor, rows: range, queries: range) -> tuple[Tensor, Tensor]:
    """(query, slot) of the candidates of some queries that lie among some rows; queries count from the first."""
    some = places[queries.start : queries.stop]
    query, slot = ((some >= rows.start) & (some < rows.stop)).nonzero(as_tuple=True)
    return query, slot


def _wanted(places: Tensor, rows: range, queries: range) -> Tensor:
    mask = torch.zeros(len(rows), len(queries), dtype=torch.bool)
    query, slot = _within(places, rows, queries)
    mask[places[queries.start + query, slot] - rows.start, query] = True
    return mask


def _require_weights(weights: str, metric: str | None, capture: Capture, checkpoint: int) -> None:
    present = capture.space()
    if weights != present.weights:
        raise FeatureMismatchError(
            f"capture: its model does not have the weights of checkpoint {checkpoint} of the features; "
            "load that checkpoint, or pass checkpoints="
        )
    if metric is not None and metric != present.metric:
        raise FeatureMismatchError(
            "capture: another optimizer metric than the features'; attach with the same preconditioner"
        )


def _ranked(question: Question, lists: Tensor, sdi: Tensor, k: int, *, harmful: bool) -> TopK:
    """The k best of each query's candidates by exact influence."""
    chosen = sdi[..., list(question.ranked)]
    values = chosen if question.per_step else chosen.sum(2, keepdim=True)
    values = values.masked_fill((lists == NO_ROW).unsqueeze(-1), torch.nan)
    ranking = Ranking(len(lists) * values.shape[2], max(1, k), smallest=harmful, dtype=sdi.dtype, device=sdi.device)
    # Candidates are in ascending order of rows, so that the lowest row wins a tie here, too.
    ranking.add(0, values.permute(1, 0, 2).flatten(1))
    slots, scores = (t[:, :k].reshape(len(lists), -1, k) for t in ranking.result())
    missing = slots == NO_ROW
    query = torch.arange(len(lists)).view(-1, 1, 1).expand_as(slots)
    if lists.shape[1]:
        at = slots.clamp(min=0)
        rows = lists[query, at].masked_fill(missing, NO_ROW)
        paths = sdi[query, at].masked_fill(missing.unsqueeze(-1), torch.nan)
    else:
        rows, paths = slots, torch.full((*slots.shape, question.steps), torch.nan)
    if not question.per_step:
        rows, scores, paths = rows[:, 0], scores[:, 0], paths[:, 0]
    return TopK(
        rows=rows,
        scores=scores,
        sdi=paths,
        train_ids=ids_of(question.train, rows),
        query_ids=question.query_ids,
        ranked=question.ranked,
        per_step=question.per_step,
        harmful=harmful,
        etas=question.etas,
    )
