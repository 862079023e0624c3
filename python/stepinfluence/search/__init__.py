"""Searching features: which training rows shaped an answer, and at which loop step (docs/search.md)."""

from stepinfluence.search.energy import checkpoint_energy
from stepinfluence.search.index import Index
from stepinfluence.search.question import Question, ask
from stepinfluence.search.recompute import Recompute
from stepinfluence.search.rerank import rerank
from stepinfluence.search.table import scores
from stepinfluence.search.topk import TopK, top_k
from stepinfluence.search.two_stage import TwoStage, exact_rows, two_stage
from stepinfluence.search.unusual import Outlier, outliers

__all__ = [
    "Index",
    "Outlier",
    "Question",
    "Recompute",
    "TopK",
    "TwoStage",
    "ask",
    "checkpoint_energy",
    "exact_rows",
    "outliers",
    "rerank",
    "scores",
    "top_k",
    "two_stage",
]
