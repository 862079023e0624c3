"""Scores that a float cannot hold: beyond the largest they are refused, below the smallest normal one told of."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

TOO_LARGE = "scores: some are too large for float32; featurize with smaller etas, or with a loss divided by a number"

REMEDY = "featurize with larger etas, or with a loss times a number"


def largest(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Largest magnitude along ``dim``, float64 on the CPU; 0 where there is nothing."""
    if not values.numel():
        kept = [n for k, n in enumerate(values.shape) if k not in ((dim,) if isinstance(dim, int) else dim)]
        return torch.zeros(kept, dtype=torch.float64)
    found: Tensor = torch.linalg.vector_norm(values, torch.inf, dim=dim)
    return found.to("cpu", torch.float64)


def tell_of_small(bounds: Tensor, dtype: torch.dtype, ids: Sequence[Hashable], what: str = "queries") -> None:
    """Tell of queries whose scores are too small for a dtype with all rows: they come as 0, or with a few bits.

    Args:
        bounds: ``(Q,)`` float64: the largest product of two numbers, one of a row and one of the query, that any of
            the query's scores is a sum of. A sum of products above the smallest normal float has no more error than
            usual; where all are below, no digit is sure. 0: a query, or all rows, without features, whose scores are 0.
        ids: of the queries, of which one is named.
        what: the Q are, if not queries.

    Raises:
        ValueError: all queries that have scores are such ones. A warning, if only some are.
    """
    some = bounds > 0
    small = some & (bounds < torch.finfo(dtype).tiny)
    if not bool(small.any()):
        return
    name = str(dtype).removeprefix("torch.")
    if bool((small == some).all()):
        raise ValueError(f"scores: all are too small for {name}, which would make them 0; {REMEDY}")
    places = small.nonzero().flatten().tolist()
    warnings.warn(
        f"scores: those of {len(places)} of {len(bounds)} {what} (such as {ids[places[0]]!r}) are too small for "
        f"{name}, and come as 0 or with few digits; {REMEDY}",
        stacklevel=3,
    )
