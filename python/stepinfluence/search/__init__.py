"""Searching features: which training rows shaped an answer, and at which loop step (docs/search.md)."""

from stepinfluence.search.rerank import rerank
from stepinfluence.search.table import scores
from stepinfluence.search.topk import TopK, top_k

__all__ = ["TopK", "rerank", "scores", "top_k"]
