"""Exact influence of given examples on given queries, recomputed from the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stepinfluence.attribution.alignment import require_repeatable
from stepinfluence.attribution.result import Influence
from stepinfluence.attribution.space import Parameters
from stepinfluence.capture import Capture
from stepinfluence.capture.body.batches import fingerprints, length_of
from stepinfluence.capture.pairs import BatchGradients, PairCapture, PairRoute
from stepinfluence.capture.session import isolated
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.loaders import IdsOf, LossFn, ids_in
from stepinfluence.progress import tqdm

QUERY_BYTES = 2 << 30
"""Factors of queries that are held at a time, unless told otherwise."""

Wanted: TypeAlias = Callable[[range, range], Tensor]
"""Which pairs of some train rows and some queries are needed, ``(len(rows), len(queries))`` bool."""


@dataclass(frozen=True)
class ExactBlock:
    """Exact influence of some train rows on some queries.

    Attributes:
        rows, queries: positions in the two loaders.
        sdi: ``(len(rows), len(queries), steps)`` of the loop steps that these queries ran.
        train_ids, query_ids: their ids.
        query_lengths: ``(len(queries),)`` int64, see :attr:`stepinfluence.Features.lengths`; None for summed queries.
    """

    rows: range
    queries: range
    sdi: Tensor
    train_ids: tuple[Hashable, ...]
    query_ids: tuple[Hashable, ...]
    query_lengths: Tensor | None


def exact_blocks(
    capture: Capture,
    loss_fn: LossFn,
    train: Iterable[Any],
    query: Iterable[Any],
    *,
    wanted: Wanted | None = None,
    per_step: bool = True,
    parameters: Parameters = None,
    route: PairRoute = "auto",
    query_bytes: int = QUERY_BYTES,
    ids: IdsOf | None = None,
    progress: bool = True,
) -> Generator[ExactBlock, None, None]:
    """Exact influence block by block; arguments and errors as for :func:`rerank`.

    Args:
        wanted: which pairs are needed; all if not given.
        per_step: False: queries summed over their steps, all of it under the first.
    """
    if not isinstance(capture, Capture):
        raise TypeError(f"capture: got {type(capture).__name__}; pass what stepinfluence.attach returns")
    if query_bytes < 1:
        raise ValueError(f"query_bytes: got {query_bytes}; give a positive number of bytes")
    names = None
    if parameters is not None:
        names = [block.name for block in capture.space().select(parameters, shared_columns=True)]
    pairs = PairCapture(capture, route=route, parameters=names)
    with isolated(capture.model, training=capture.training):
        seen: list[tuple[list[Hashable], list[int]]] = []
        for number, group in enumerate(_groups(pairs, loss_fn, query, query_bytes, ids, per_step=per_step)):
            if number:
                require_repeatable(train, "train", has_ids=ids is not None)
            total = length_of(train)
            first, index = 0, -1
            batches = train if total is not None else iter(train)
            bar = tqdm(batches, total=total, desc="exact influence", unit="batch", delay=2, disable=not progress)
            for index, batch in enumerate(bar):
                kept = pairs.record(batch, loss_fn, ids_in(batch, ids), index, per_step=False, first=first)
                content = [] if ids else fingerprints(batch, kept.size, capture.batch_dim)
                _check_order(seen, number, index, kept, content)
                rows = range(first, first + kept.size)
                for start, queries in group:
                    columns = range(start, start + queries.size)
                    mask = None if wanted is None else wanted(rows, columns)
                    found = pairs.influence(kept, queries, mask)
                    yield ExactBlock(rows, columns, found, kept.ids, queries.ids, queries.lengths)
                first += kept.size
            if number and index + 1 < len(seen):
                raise FeatureMismatchError(
                    f"train: the loader gave {len(seen)} batches, and {index + 1} when it was gone through again; pass "
                    "a list of batches"
                )


def _check_order(
    seen: list[tuple[list[Hashable], list[int]]], number: int, index: int, kept: BatchGradients, content: list[int]
) -> None:
    """Training examples are gone through once for every group of queries: each time the same, in the same order."""
    found = list(kept.ids), content
    if not number:
        seen.append(found)
    elif index >= len(seen) or seen[index] != found:
        raise FeatureMismatchError(
            f"train: batch {index} holds other examples when the loader is gone through again for further queries; "
            "give it a fixed order, or raise query_bytes so that all queries are held at once"
        )


def _groups(
    pairs: PairCapture, loss_fn: LossFn, query: Iterable[Any], limit: int, ids: IdsOf | None, *, per_step: bool
) -> Iterator[list[tuple[int, BatchGradients]]]:
    """Batches of queries with the position of their first, in groups of about ``limit`` bytes of factors."""
    group: list[tuple[int, BatchGradients]] = []
    held = first = 0
    for index, batch in enumerate(query):
        kept = pairs.record(batch, loss_fn, ids_in(batch, ids), index, per_step=per_step, first=first)
        if group and held + kept.bytes > limit:
            yield group
            group, held = [], 0
        group.append((first, kept))
        held += kept.bytes
        first += kept.size
    if group:
        yield group


def rerank(
    capture: Capture,
    loss_fn: LossFn,
    train: Iterable[Any],
    query: Iterable[Any],
    *,
    parameters: Parameters = None,
    route: PairRoute = "auto",
    query_bytes: int = QUERY_BYTES,
    ids: IdsOf | None = None,
    progress: bool = True,
) -> Influence:
    """Exact Step-Decomposed Influence of some training examples on some queries, at the model's present weights.

    One forward and backward pass over the queries, and one over the training examples for every ``query_bytes`` of
    queries. No gradient of the model is kept: :class:`stepinfluence.capture.pairs.PairCapture` says what is, and
    docs/search.md what it costs.

    Args:
        capture: from :func:`stepinfluence.attach`; its model, body, loop and metric count, its sketches do not.
        loss_fn: ``loss_fn(model, batch) -> (B,)``.
        train, query: loaders that give the same batches each time they are iterated. A batch of training examples is
            held in factors, about as large as the activations of its backward pass.
        parameters: restrict influence to body parameters: a name or several, ``*`` and ``?`` allowed.
        route: ``"tokens"`` for pairs of tokens wherever possible, ``"gradients"`` for gradients of one parameter at a
            time, ``"auto"`` for the cheaper one, parameter by parameter.
        query_bytes: factors of queries that are held at a time.
        ids: ``ids(batch) -> sequence`` of one hashable per example; running numbers if not given.
        progress: show a progress bar on work of over two seconds.

    Returns:
        :class:`~stepinfluence.Influence` with ``sdi`` ``(n_train, n_query, steps)`` on the body's device, float32
        (float64 for a float64 body); eta is 1.

    Raises:
        ValueError, TypeError: an argument is none of those above.
        FeatureMismatchError: the training loader gives other examples when it is gone through again.
        LossError, BodyError, UnsupportedUseError, LayoutError: as for ``Capture.featurize``.
    """
    blocks = list(
        exact_blocks(
            capture,
            loss_fn,
            train,
            query,
            parameters=parameters,
            route=route,
            query_bytes=query_bytes,
            ids=ids,
            progress=progress,
        )
    )
    rows = max((b.rows.stop for b in blocks), default=0)
    queries = max((b.queries.stop for b in blocks), default=0)
    steps = max((b.sdi.shape[2] for b in blocks), default=0)
    sdi = torch.zeros(rows, queries, steps, dtype=capture.dtype, device=capture.device)
    train_ids: dict[int, Hashable] = {}
    query_ids: dict[int, Hashable] = {}
    lengths = torch.zeros(queries, dtype=torch.int64)
    for b in blocks:
        sdi[b.rows.start : b.rows.stop, b.queries.start : b.queries.stop, : b.sdi.shape[2]] = b.sdi
        train_ids.update(zip(b.rows, b.train_ids, strict=True))
        query_ids.update(zip(b.queries, b.query_ids, strict=True))
        assert b.query_lengths is not None  # by step
        lengths[b.queries.start : b.queries.stop] = b.query_lengths
    return Influence(
        sdi,
        "query",
        tuple(train_ids[k] for k in range(rows)),
        tuple(query_ids[k] for k in range(queries)),
        (1.0,),
        query_lengths=lengths,
    )
