"""A looped character language model on text that Python itself ships: the topics of ``help()``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems.common import collate, planted, shortened
from stepinfluence.evaluation.training import Recipe
from stepinfluence.models.gpt import LoopedGPT, LoopedGPTConfig, gpt_loss

Example = tuple[Tensor, Tensor]

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz.,'"
"""What other characters become is a space."""

LANGUAGE = Recipe(80, 8e-3, warmup=15, decay=True, root_epsilon=1e-6, batch_size=48)


def language(
    *,
    n_train: int = 192,
    n_query: int = 32,
    updates: int | None = None,
    length: int = 32,
    steps: int = 4,
    seed: int = 0,
) -> Problem:
    """Predict the next character of Python's reference. A query asks about a topic that is trained on.

    One training passage in sixteen has its characters shuffled. The text is that of this Python's ``help()`` topics,
    so that other versions have other data.

    Args:
        n_train, n_query: passages; ``n_train`` is a multiple of ``n_query``.
        updates: in place of the recipe's.
        length: characters of a passage that are predicted.
        steps: of the loop.
        seed: of the data.

    Raises:
        ValueError: ``n_train`` is no multiple of ``n_query``, or more passages than there are.
    """
    if n_train % n_query:
        raise ValueError(f"n_train, n_query: got {n_train} and {n_query}; use a multiple of the queries")
    rng = np.random.default_rng(seed)
    each = n_train // n_query
    topics = [text for text in _topics() if len(text) >= (each + 1) * (length + 1)]
    if n_query > len(topics):
        raise ValueError(f"n_query: got {n_query}; this Python has {len(topics)} topics that are long enough")
    train, queries = [], []
    for topic in rng.permutation(len(topics))[:n_query]:
        places = rng.permutation(len(topics[topic]) // (length + 1))[: each + 1] * (length + 1)
        passages = [topics[topic][place : place + length + 1] for place in places]
        train.extend(passages[:-1])
        queries.append(passages[-1])
    wrong = planted(rng, n_train)
    for row in np.flatnonzero(wrong):
        train[row] = "".join(rng.permutation(list(train[row])))
    recipe = LANGUAGE if updates is None else shortened(LANGUAGE, updates)
    return Problem(
        name="language",
        train=[_example(text) for text in train],
        queries=[_example(text) for text in queries],
        untrained=lambda seed: _model(seed, length, steps),
        loss=loss,
        body=lambda model: model.core,  # type: ignore[return-value, arg-type]
        collate=collate,
        training=recipe,
        mislabelled=wrong,
        about=f"characters of the help() topics of Python {platform.python_version()}; loss in nats per character",
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy ``(B,)`` of the next character."""
    tokens, targets = batch
    return gpt_loss(model, {"tokens": tokens, "targets": targets})


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    named: Mapping[str, str] = topics
    return [_plain(named[name]) for name in sorted(named)]


def _plain(text: str) -> str:
    """Lower case, known characters only, no run of spaces."""
    kept = "".join(c if c in CHARACTERS else " " for c in text.lower())
    lines = (" ".join(line.split()) for line in kept.split("\n"))
    return "\n".join(line for line in lines if line)


def _example(text: str) -> Example:
    ids = torch.tensor([CHARACTERS.index(c) for c in text])
    return ids[:-1], ids[1:]


def _model(seed: int, length: int, steps: int) -> nn.Module:
    config = LoopedGPTConfig(
        vocab_size=len(CHARACTERS), d_model=32, n_heads=2, sequence_len=length, n_prelude=0, n_core=1, n_coda=0,
        steps=steps, mlp_ratio=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoopedGPT(config)
