"""How far sketches can be trusted: standard errors of scores, and rankings by either half of the columns.

**Standard error.** The variance of a sketched inner product is at most ``c |X|^2 |Y|^2`` for each parameter
(:func:`sdi_kernels.variance_bound`), sketches of different parameters are independent, and the squared norms are
estimated by the sketches' own. Checkpoints share their tables, so their errors are added up as if they agreed.

**Halves.** A sketch of m columns holds two of m/2: buckets p and p + m/2 added, and subtracted. Both are unbiased, with
errors whose difference is noise of the size of the whole sketch's. What leads by either half does not lead by luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdi_kernels import variance_bound
from stepinfluence.attribution.curvature import Curvature
from stepinfluence.attribution.features import Features
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.search.question import Question
from stepinfluence.search.ranking import NO_ROW, Ranking
from stepinfluence.search.scan import score_blocks
from stepinfluence.search.sources import RowSource
from stepinfluence.search.topk import best_rows
from stepinfluence.store.manifest import SketchSpec

NOT_REFITTED = "SOURCE is not fitted again to halves of the columns"

REFIT_BYTES = 256 << 20
"""Decoded rows of a store whose curvature is fitted again to halves of the columns, at most."""

REFIT_SIDE = 2048
"""Rows, or columns, that such a store may have: the smaller number of the two."""


@dataclass(frozen=True)
class Halves:
    """What either half of the columns says.

    Attributes:
        rows: ``(2, Q, k)`` int64: the leading rows by each half, best first; -1 where there are fewer.
        noise: ``(Q,)`` float32: root mean square, over the rows that were asked about, of half the difference of the
            halves' scores: a standard error of these scores, as one draw of the noise has it. NaN where none was asked.
    """

    rows: Tensor
    noise: Tensor


@dataclass(frozen=True)
class _Part:
    """Columns of a row that a sketch of its own fills, as they lie in a question's columns."""

    columns: slice
    bound: float

    @property
    def half(self) -> int:
        return int(self.columns.stop - self.columns.start) // 2


def why_no_errors(source: RowSource, *, corrected: bool) -> str:
    """Why scores have no standard errors, in words; empty if they do."""
    if corrected:
        return "scores that are corrected for curvature have none: the correction mixes the sketch's columns"
    if source.folded is not None:
        return "checkpoints are folded, whose noise is not that of sketches alone"
    if source.spaces[0].kind == "sketch" and source.sketch is None:
        return "features in memory do not tell how they were sketched"
    return ""


def standard_errors(question: Question, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of scores, at most, from sketching alone (rounding by a store's dtype comes on top).

    Args:
        question: from :func:`ask`, without curvature.
        rows: ``(Q, n)`` int64; -1 for none.

    Returns:
        ``(Q, n)`` of what rows are ranked by, and ``(Q, n, steps)`` by step, float32; NaN where there is no row, and
        zero for exact features.

    Raises:
        ValueError: there are none (says why).
    """
    problem = why_no_errors(question.train, corrected=question.corrected)
    if problem:
        raise ValueError(f"question: no standard errors: {problem}")
    wanted = rows[rows != NO_ROW].unique()
    place = torch.searchsorted(wanted, rows.clamp(min=0)).clamp(max=max(0, len(wanted) - 1))
    found = torch.zeros(*rows.shape, question.steps + 1, dtype=torch.float64)
    parts = _parts(question)
    for checkpoint in question.counted if len(wanted) else ():
        values = question.train.take(checkpoint, wanted.tolist())[..., question.columns].double().cpu()
        values = values.sum(1) if values.dim() == 3 else values
        vectors = question.vectors[checkpoint].double().cpu()
        asked = torch.cat([vectors, vectors[:, list(question.ranked)].sum(1, keepdim=True)], 1)
        variance = torch.zeros_like(found)
        for part in parts:
            left = values[:, part.columns].square().sum(1)
            right = asked[..., part.columns].square().sum(2)
            variance += part.bound * left[place].unsqueeze(2) * right.unsqueeze(1)
        found += variance.sqrt()
    found[rows == NO_ROW] = torch.nan
    return found[..., -1].float(), found[..., :-1].float()


def halves(
    question: Question, k: int, rows: Tensor, *, curvature: Sequence[Curvature] | None = None, progress: bool = False
) -> Halves:
    """The k leading rows of each query by either half of the sketches' columns, and how far the halves are apart.

    Args:
        question: from :func:`ask`, not ranked per step; without the curvature.
        k: how many rows.
        rows: ``(Q, n)`` int64 rows to compare the halves' scores of; -1 for none.
        curvature: of each checkpoint, for scores that are corrected: it is fitted again to either half.

    Raises:
        ValueError: there are no halves (:func:`why_no_halves` says why).
    """
    _require_halves(question, curvature)
    wanted = rows[rows != NO_ROW].unique()
    if curvature is not None:
        scores = half_scores(question, curvature=curvature)
        ranking = Ranking(2 * scores.shape[2], k, smallest=question.harmful, dtype=scores.dtype, device=scores.device)
        ranking.add(torch.cat([scores[0], scores[1]], 1))
        found, _ = ranking.result()
        apart = (scores[0] - scores[1])[wanted].double() / 2
    else:
        both = _as_queries(question)
        found, _ = best_rows(both, k, progress=progress)
        apart = _products(question, wanted, tuple(_rolled(question, v) for v in question.vectors))
    noise = _root_mean(apart, wanted, rows) if len(wanted) else torch.full((len(rows),), torch.nan)
    return Halves(found.view(2, len(question.query_ids), -1), noise)


def half_scores(question: Question, *, curvature: Sequence[Curvature] | None = None) -> Tensor:
    """``(2, N, Q)`` float32: the scores of all rows by either half of the columns; NaN for rows that failed.

    Half the difference of the two is noise of the size of the whole sketch's. Arguments and errors as for
    :func:`halves`.
    """
    _require_halves(question, curvature)
    count = len(question.query_ids)
    if curvature is not None:
        return _refitted(question, curvature)
    both = _as_queries(question)
    scores = torch.empty(len(question.train), 2 * count)
    first = 0
    with torch.no_grad():
        for block in score_blocks(both, both.heads()):
            scores[first : first + len(block)] = block.float().cpu()
            first += len(block)
    return scores.view(-1, 2, count).transpose(0, 1)


def _require_halves(question: Question, curvature: Sequence[Curvature] | None) -> None:
    problem = why_no_halves(question.train, corrected=curvature is not None)
    if problem:
        raise ValueError(f"question: no halves: {problem}")


def _as_queries(question: Question) -> Question:
    """The question by the one half of the columns, and by the other, as queries of their own."""
    rolled = [_rolled(question, v) for v in question.vectors]
    return replace(
        question,
        vectors=tuple(torch.cat([w + r, w - r]) for w, r in zip(question.vectors, rolled, strict=True)),
        query_ids=question.query_ids * 2,
        valid=torch.from_numpy(question.valid).repeat(2).numpy(),
    )


def why_no_halves(source: RowSource, *, corrected: bool) -> str:
    """Why there are no rankings by halves of the columns, in words; empty if there are."""
    problem = why_no_errors(source, corrected=False)
    if problem or source.spaces[0].kind != "sketch":
        return problem or "these are exact gradients, which have no noise"
    space = source.spaces[0]
    if corrected:
        odd = [part for part in _all(source) if part.bound and (part.columns.stop - part.columns.start) % 2]
        if space.layout == "sum" or odd:
            return "a curvature is fitted again to halves of an even number of columns for each parameter only"
        if 4 * len(source) * space.width > REFIT_BYTES or min(len(source), space.width) > REFIT_SIDE:
            size = f"{len(source):,} rows of {space.width:,} columns"
            return f"a curvature is not fitted again to halves of {size}: it would take too long"
    return ""


def _products(question: Question, wanted: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """``(len(wanted), Q)`` float64: products of some rows with queries, summed over the ranked steps."""
    total = torch.zeros(len(wanted), len(question.query_ids), dtype=torch.float64)
    for checkpoint in question.counted if len(wanted) else ():
        values = question.train.take(checkpoint, wanted.tolist())[..., question.columns].double().cpu()
        values = values.sum(1) if values.dim() == 3 else values
        total += values @ vectors[checkpoint][:, list(question.ranked)].sum(1).double().cpu().T
    return total


def _root_mean(noise: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """``(Q,)`` of ``noise (len(wanted), Q)`` at each query's rows."""
    place = torch.searchsorted(wanted, rows.clamp(min=0)).clamp(max=len(wanted) - 1)
    mine = noise.T.gather(1, place).square().masked_fill(rows == NO_ROW, torch.nan)
    return mine.nanmean(1).sqrt().float()


def _parts(question: Question) -> list[_Part]:
    """The sketches that a question's columns hold."""
    first = question.columns.start or 0
    found = [replace(p, columns=slice(p.columns.start - first, p.columns.stop - first)) for p in _all(question.train)]
    return [p for p in found if p.columns.start >= 0 and p.columns.stop <= question.vectors[0].shape[2]]


def _all(source: RowSource) -> Iterator[_Part]:
    space, spec = source.spaces[0], source.sketch
    if space.kind != "sketch":
        yield _Part(slice(0, space.width), 0.0)
        return
    assert spec is not None
    if space.layout == "sum":  # sketches of different parameters meet in the same columns: 2/m between them
        yield _Part(slice(0, space.width), max([2 / space.width, *(_bound(b, spec) for b in space.blocks)]))
        return
    for block in space.blocks:
        yield _Part(slice(block.start, block.stop), _bound(block, spec))


def _bound(block: Block, spec: SketchSpec) -> float:
    return variance_bound(block.shape, block.stop - block.start, spec.hashing)


def _rolled(question: Question, vectors: Tensor) -> Tensor:
    """Query vectors with each sketch's columns rolled by half of them; zero where a sketch is lossless."""
    rolled = torch.zeros_like(vectors)
    for part in _parts(question):
        if part.bound and part.half:
            rolled[..., part.columns] = vectors[..., part.columns].roll(part.half, -1)
    return rolled


# ----------------------------------------------------------------------------------------------------------------
# Under a curvature


def _refitted(question: Question, curvature: Sequence[Curvature]) -> Tensor:
    """:func:`half_scores` with the curvature of either half."""
    source, parts = question.train, list(_all(question.train))
    count = len(question.query_ids)
    scores = torch.zeros(2, len(source), count)
    inside = torch.zeros(source.spaces[0].width, dtype=torch.bool)
    for block in source.spaces[0].select(question.parameters):
        inside[block.start : block.stop] = True
    valid = torch.from_numpy(source.valid)
    for checkpoint in question.counted:
        everyone = source.take(checkpoint, range(len(source))).float()
        everyone = everyone.sum(1) if everyone.dim() == 3 else everyone
        asked = _ranked_sum(question, checkpoint)
        losses = torch.from_numpy(source.losses(checkpoint)).float()
        for sign in (0, 1):
            space, columns = _half_space(source.spaces[checkpoint], parts, inside)
            left, right = (_half(values, parts, 1 - 2 * sign) for values in (everyone, asked))
            fitted = type(curvature[checkpoint]).fit(
                _features(left[valid], losses[valid], space), damping=curvature[checkpoint].setting
            )
            scores[sign] += question.etas[checkpoint] * left @ (fitted.solve(right) * columns).T
    scores[:, ~valid] = torch.nan
    return scores


def _ranked_sum(question: Question, checkpoint: int) -> Tensor:
    """Queries as they are stored, ``(Q, D)``, summed over the steps that rows are ranked by."""
    values = question.query.take(checkpoint, range(len(question.query_ids))).float()
    values = values if values.dim() == 3 else values.unsqueeze(1)
    return values[:, [t for t in question.ranked if t < values.shape[1]]].sum(1)


def _half(values: Tensor, parts: Sequence[_Part], sign: int) -> Tensor:
    """Rows in half the columns: buckets half a sketch apart added, or subtracted; lossless sketches as they are."""
    found = []
    for part in parts:
        mine = values[..., part.columns]
        found.append(mine[..., : part.half] + sign * mine[..., part.half :] if part.bound and part.half else mine)
    return torch.cat(found, -1)


def _half_space(space: FeatureSpace, parts: Sequence[_Part], inside: Tensor) -> tuple[FeatureSpace, Tensor]:
    """What half the columns mean, and which of them count (1 or 0)."""
    blocks, counts, start = [], [], 0
    for block, part in zip(space.blocks, parts, strict=True):
        width = part.half if part.bound and part.half else block.stop - block.start
        blocks.append(replace(block, start=start, stop=start + width))
        counts.append(inside[block.start].float().expand(width))
        start += width
    return replace(space, blocks=tuple(blocks)), torch.cat(counts)


def _features(values: Tensor, losses: Tensor, space: FeatureSpace) -> Features:
    return Features(
        values=values,
        losses=losses,
        steps=torch.ones(len(values), dtype=torch.int64),
        lengths=None,
        ids=tuple(range(len(values))),
        space=space,
        step_labels=(),
    )
