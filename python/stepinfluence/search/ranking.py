"""The best rows so far, for many rankings at a time."""

from __future__ import annotations

import torch
from torch import Tensor

NO_ROW = -1
"""In place of a row number where there are fewer than k rows."""

RANKED_TOGETHER = 1 << 18
"""Scores that are collected before they are ranked: small shards would cost more to rank than to multiply."""


class Ranking:
    """Running top-k of ``count`` rankings over rows that come in ascending order.

    Of rows with equal scores the lowest comes first. Scores that are not finite never enter.
    """

    def __init__(self, count: int, k: int, *, smallest: bool, dtype: torch.dtype, device: torch.device) -> None:
        self._k, self._sign = k, -1 if smallest else 1
        self._scores = torch.full((count, k), -torch.inf, dtype=dtype, device=device)
        self._rows = torch.full((count, k), NO_ROW, dtype=torch.int64, device=device)
        self._waiting: list[Tensor] = []
        self._first = 0

    def add(self, scores: Tensor) -> None:
        """Take the next rows into account, counted from 0; ``scores`` is ``(r, count)``."""
        self._waiting.append(scores)
        if sum(s.numel() for s in self._waiting) >= RANKED_TOGETHER:
            self._rank()

    def _rank(self) -> None:
        """Merge the rows that wait into the best so far."""
        scores, first = torch.cat(self._waiting), self._first
        self._waiting, self._first = [], first + len(scores)
        if not len(scores):
            return
        signed = scores.T * self._sign
        if not bool(torch.isfinite(signed.sum())):  # finite only if all are, unless the sum overflows
            signed = signed.masked_fill(~torch.isfinite(signed), -torch.inf)
        # Rows that come later lose a tie: only those that beat some ranking's last place count.
        beats = (signed > self._scores[:, -1:]).any(0).nonzero().flatten()
        if not len(beats):
            return
        values, order = _top(signed[:, beats], min(self._k, len(beats)))
        both = torch.cat([self._scores, values], 1)
        rows = torch.cat([self._rows, beats[order] + first], 1)
        # Old rows are lower than new ones, and each side is in order: a stable sort keeps the lowest row first.
        best = both.argsort(dim=1, descending=True, stable=True)[:, : self._k]
        self._scores = both.gather(1, best)
        self._rows = rows.gather(1, best)

    def result(self) -> tuple[Tensor, Tensor]:
        """Rows ``(count, k)`` int64 and scores, best first, on the CPU; ``NO_ROW`` and NaN where there is none."""
        if self._waiting:
            self._rank()
        missing = self._scores == -torch.inf
        rows = self._rows.masked_fill(missing, NO_ROW)
        scores = (self._scores * self._sign).masked_fill(missing, torch.nan)
        return rows.cpu(), scores.cpu()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``scores``, in descending order, ties by ascending index."""
    values, order = scores.topk(k, 1)
    # topk is free to choose among equal scores: those rankings in which it had a choice, or equal winners, are sorted.
    last = values[:, -1:]
    chosen = (values == last).sum(1)
    tied = (scores == last).sum(1) > chosen
    if k > 1:
        tied |= (values[:, 1:] == values[:, :-1]).any(1)
    if bool(tied.any()):
        order[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order
