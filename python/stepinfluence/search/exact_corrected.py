"""Exact scores corrected for curvature, from the exact inner products of all training rows.

With ``G`` the exact gradients of the N training rows and ``K = G G^T``, the matrix inversion lemma gives

    G (G^T G / N + lambda)^-1 phi_t = (K / N + lambda)^-1 G phi_t ,

so that inner products are all that is needed: of every row with every row, and with the queries' steps. No gradient is
kept, and there is no sketch in it (docs/curvature.md).
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from stepinfluence.attribution.curvature import Fisher, Unrolled
from stepinfluence.attribution.curvature.factors import EXACT_SIDE
from stepinfluence.search.question import Question
from stepinfluence.search.recompute import Batches, Recompute, visited
from stepinfluence.search.rerank import exact_blocks


def require_correctable(question: Question) -> None:
    """Raise unless the exact scores of a question with a curvature can be computed.

    Raises:
        ValueError: another curvature than :class:`~stepinfluence.Fisher`, some parameters only, or too many rows.
    """
    count = int(question.train.valid.sum())
    fitted = question.curvature
    if isinstance(fitted, Unrolled) or not all(isinstance(one, Fisher) for one in fitted or ()):
        raise ValueError("curvature: exact scores are corrected for curvature='fisher' only; use that, or 'none'")
    if question.parameters is not None:
        raise ValueError(
            "parameters: exact scores are corrected over all parameters; leave out parameters= or curvature="
        )
    if count > EXACT_SIDE:
        raise ValueError(
            f"curvature: exact scores need the inner products of all {count:,} training rows with each other; at most "
            f"{EXACT_SIDE:,} are taken; ask with curvature='none' for exact influence of a short list"
        )


def corrected_scores(question: Question, exact: Recompute, *, progress: bool) -> Tensor:
    """``(K / N + lambda)^-1 G phi_t`` times eta, summed over checkpoints.

    Args:
        question: with a curvature; lambda is its damping times the largest eigenvalue of ``K / N``, or
            one over training's length.
        exact, progress: as for :func:`stepinfluence.search.two_stage`.

    Returns:
        ``(Q, N, steps)`` float32; zero for rows and queries that have no features. Computed in float64 from inner
        products in the model's precision.

    Raises:
        FeatureMismatchError, ValueError: as for :func:`stepinfluence.search.two_stage`.
    """
    rows = torch.from_numpy(question.train.valid.nonzero()[0])
    queries = torch.from_numpy(question.valid.nonzero()[0])
    scores = torch.zeros(len(question.query_ids), len(question.train), question.steps)
    with closing(visited(question, rows, queries, exact)) as checkpoints:
        for checkpoint, eta in checkpoints:
            assert isinstance(question.curvature, tuple)
            gram = _gram(rows, exact, progress=progress) / len(rows)
            values, vectors = torch.linalg.eigh(gram)
            damping = question.curvature[checkpoint].absolute(float(values[-1]))
            products = _with_queries(rows, queries, exact, progress=progress)
            solved = vectors @ ((vectors.T @ products.flatten(1)) / (values + damping).unsqueeze(1))
            found = solved.view_as(products).transpose(0, 1).float() * eta
            more = found.shape[2] - scores.shape[2]  # queries summed over steps do not tell how many
            scores = torch.nn.functional.pad(scores, (0, max(0, more)))
            scores[queries.unsqueeze(1), rows, : found.shape[2]] += found
    return scores


def _gram(rows: Tensor, exact: Recompute, *, progress: bool) -> Tensor:
    """``(N, N)`` float64: inner products of the rows' gradients, summed over steps."""

    def upper(some: range, others: range) -> Tensor:
        return torch.tensor(some).unsqueeze(1) <= torch.tensor(others)

    data = Batches(exact.train, rows, exact)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    blocks = exact_blocks(
        exact.capture,
        exact.loss_fn,
        data,
        data,
        wanted=upper,
        per_step=False,
        route=exact.route,
        query_bytes=exact.query_bytes,
        progress=progress,
    )
    with closing(blocks):
        for block in blocks:
            here = slice(block.rows.start, block.rows.stop), slice(block.queries.start, block.queries.stop)
            gram[here] = block.sdi.sum(2).double().cpu()
    return gram.triu() + gram.triu(1).T


def _with_queries(rows: Tensor, queries: Tensor, exact: Recompute, *, progress: bool) -> Tensor:
    """``(N, Q, steps)`` float64: inner products of the rows' gradients with the queries' by step."""
    products = torch.zeros(len(rows), len(queries), 0, dtype=torch.float64)
    blocks = exact_blocks(
        exact.capture,
        exact.loss_fn,
        Batches(exact.train, rows, exact),
        Batches(exact.query, queries, exact),
        route=exact.route,
        query_bytes=exact.query_bytes,
        progress=progress,
    )
    with closing(blocks):
        for block in blocks:
            steps = block.sdi.shape[2]
            products = torch.nn.functional.pad(products, (0, max(0, steps - products.shape[2])))
            here = slice(block.rows.start, block.rows.stop), slice(block.queries.start, block.queries.stop)
            products[(*here, slice(0, steps))] = block.sdi.double().cpu()
    return products
