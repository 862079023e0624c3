"""Lookups that are reduced over bags of rows: ``nn.EmbeddingBag``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepinfluence.capture.uses.interceptor import Interceptor

NAMES = (
    "weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
    "include_last_offset", "padding_idx",
)  # fmt: skip


def embedding_bag(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.embedding_bag``, to which ``F.embedding_bag`` comes down (rows of a matrix of ids have offsets by then).

    A lookup of bags padded to one length, then reduced. An example has one bag, or several."""
    given = dict(zip(NAMES, args, strict=False)) | kwargs
    table, ids, offsets, weights = (given.get(n) for n in ("weight", "indices", "offsets", "per_sample_weights"))
    sources = [s for s in map(it.source, (table, weights)) if s is not None]
    if it.source(table) is None or it.source(weights) is not None:
        raise it.unsupported(sources, func, "per_sample_weights that are parameters; look up and multiply yourself")
    assert isinstance(table, Tensor)
    assert isinstance(ids, Tensor)
    assert isinstance(offsets, Tensor)
    with torch.no_grad():
        detached = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        plain = func(*detached[0], **detached[1])
    ends = torch.cat([offsets, offsets.new_tensor([len(ids)])])[: len(plain[0]) + 1]
    lengths = ends.diff()
    places = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1, device=ids.device)
    there = places < lengths.unsqueeze(1)
    at = torch.where(there, offsets[: len(lengths)].unsqueeze(1) + places, 0)
    with it:
        padded = ids[at] if len(ids) else ids.new_zeros(at.shape)
    padding = given.get("padding_idx")
    if padding is not None and padding >= 0:
        there = there & (padded != padding)
    if given.get("scale_grad_by_freq"):
        raise it.unsupported(sources, func, "scale_grad_by_freq mixes the examples of a batch")
    with it:
        rows = torch.embedding(table, padded)
        return (_reduced(rows, there, weights, at, given.get("mode", 0)), *plain[1:])


def _reduced(rows: Tensor, there: Tensor, weights: Tensor | None, at: Tensor, mode: int) -> Tensor:
    """``(bags, longest, d)`` to ``(bags, d)``: sum (0), mean (1) or maximum (2) of what is ``there``."""
    shown = there.unsqueeze(-1)
    if mode == 2:
        highest = rows.masked_fill(~shown, -torch.inf).max(1).values
        return torch.where(there.any(1, keepdim=True), highest, 0.0)
    weighted = rows if weights is None else rows * weights[at].unsqueeze(-1)
    total = torch.where(shown, weighted, 0.0).sum(1)
    return total / there.sum(1, keepdim=True).clamp(min=1) if mode == 1 else total
