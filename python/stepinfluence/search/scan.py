"""Inner products of stored rows with query vectors, block by block, without decoding what need not be decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdi_kernels import row_products
from stepinfluence.attribution.extremes import TOO_LARGE, largest, tell_of_small
from stepinfluence.search.question import Question
from stepinfluence.search.sources import RawBlock

BLOCK_BYTES = 32 << 20
"""Bytes of decoded rows and of scores that a scan holds at a time, each."""

DECODED_ROWS_BYTES = 1 << 20
"""Decoded rows that a product on the CPU works on at a time: they stay in the cache."""


def products(block: RawBlock, vectors: Tensor, columns: slice) -> Tensor:
    """``(r, C)``: each row's values, summed over steps, times each of ``vectors (C, columns)``; in their dtype."""
    codes, scales = block.codes[..., columns], block.scales
    lead = codes.shape[:-1]
    if vectors.device.type != "cpu":
        codes = codes.to(vectors.device, non_blocking=True)
    flat = codes.reshape(-1, codes.shape[-1])
    gains = None if scales is None else scales.reshape(-1).to(vectors.device)
    quick = row_products(flat, gains, vectors)
    if quick is not None:
        return quick if len(lead) == 1 else quick.view(*lead, len(vectors)).sum(1)
    found = vectors.new_empty(len(flat), len(vectors))
    some = len(flat) if flat.device.type != "cpu" else max(16, DECODED_ROWS_BYTES // (4 * max(1, flat.shape[1])))
    for k in range(0, len(flat), max(1, some)):
        torch.mm(flat[k : k + some].to(vectors.dtype), vectors.T, out=found[k : k + some])
    if gains is not None:
        found.mul_(gains.to(found).unsqueeze(1))
    return found if len(lead) == 1 else found.view(*lead, len(vectors)).sum(1)


def score_blocks(question: Question, vectors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Scores ``(r, C)`` of all rows in order, summed over checkpoints; ``vectors`` are ``(C, columns)`` by
    checkpoint. Scores of rows without features are NaN.

    Raises:
        ValueError: a score is too large for the dtype, or all are too small (a warning, if those of some queries are).
    """
    train = question.train
    valid = torch.from_numpy(train.valid)
    counted = question.counted
    vectors = tuple(vectors[k] for k in counted)
    small = _Small(question, vectors)
    for blocks in zip(*(train.blocks(k) for k in counted), strict=True):
        rows = len(blocks[0].codes)
        held = len(vectors[0])  # numbers that a stored row becomes
        if question.device.type != "cpu":  # rows are decoded a block at a time there, else a few at a time or never
            held = max(held, vectors[0].shape[1])
        per_row = held * max((b.codes.shape[1] if b.codes.dim() == 3 else 1) for b in blocks)
        size = max(1, BLOCK_BYTES // (vectors[0].element_size() * max(1, per_row)))
        for start in range(0, rows, size):
            parts = [b.part(start, start + size) for b in blocks]
            scores = products(parts[0], vectors[0], question.columns)
            for part, some in zip(parts[1:], vectors[1:], strict=True):
                scores += products(part, some, question.columns)
            first = parts[0].first
            good = valid[first : first + len(scores)]
            if not bool(torch.isfinite(scores.sum())):  # finite only if all are, unless the sum overflows
                _require_no_overflow(scores, good.to(scores.device), parts, vectors)
            small.look(scores, parts)
            if not bool(good.all()):
                scores[~good.to(scores.device)] = torch.nan
            yield scores
    small.tell()


class _Small:
    """Watches for queries all of whose scores are too small for the dtype; looks at rows only as long as there may be
    such a query."""

    def __init__(self, question: Question, vectors: Sequence[Tensor]) -> None:
        self._question = question
        self._tiny = torch.finfo(vectors[0].dtype).tiny
        # Of the queries, or of each of their steps where they are ranked by it, (checkpoints, rankings); of the rows.
        self._asked = torch.stack([self._by_ranking(largest(v, 1)) for v in vectors])
        self._rows = torch.zeros(len(vectors), dtype=torch.float64)
        self._scores = torch.zeros(self._asked.shape[1], dtype=torch.float64)
        self._watching = bool(self._asked.any())

    def _by_ranking(self, columns: Tensor) -> Tensor:
        if self._question.per_step or not len(columns):
            return columns
        return columns.view(len(self._question.query_ids), -1).amax(1)

    def look(self, scores: Tensor, parts: Sequence[RawBlock]) -> None:
        """Take a block's scores ``(r, C)`` and rows into account."""
        if not self._watching:
            return
        self._scores = torch.maximum(self._scores, self._by_ranking(largest(scores, 0)))
        self._rows = torch.maximum(self._rows, torch.stack([self._of_rows(part) for part in parts]))
        self._watching = bool(((self._scores < self._tiny) & (self._asked > 0).any(0)).any())

    def _of_rows(self, part: RawBlock) -> Tensor:
        codes = part.codes[..., self._question.columns]
        found = largest(codes.float() if codes.dtype == torch.int8 else codes, -1)
        return (found if part.scales is None else found * part.scales.cpu()).amax()

    def tell(self) -> None:
        """All rows were looked at."""
        if self._watching:
            bounds = (self._asked * self._rows.unsqueeze(1)).amax(0)
            each = len(bounds) // len(self._question.query_ids)
            ids = [i for i in self._question.query_ids for _ in range(each)]
            what = "steps of queries" if self._question.per_step else "queries"
            tell_of_small(bounds, self._question.vectors[0].dtype, ids, what)


def _require_no_overflow(scores: Tensor, good: Tensor, parts: Sequence[RawBlock], vectors: Sequence[Tensor]) -> None:
    """Raise where finite rows and finite queries have a score that is not: left out, it would be missed at the top.

    Raises:
        ValueError: there is one.
    """
    wrong = ~torch.isfinite(scores) & good.unsqueeze(1)
    for mine in vectors:
        wrong[:, ~torch.isfinite(mine).all(1)] = False
    for row in wrong.any(1).nonzero().flatten().tolist():
        stored = [given[row] for part in parts for given in (part.codes, part.scales) if given is not None]
        if all(bool(torch.isfinite(values).all()) for values in stored):
            raise ValueError(TOO_LARGE)
