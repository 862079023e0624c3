"""Batches of padded text and their loss, for language models of ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS, VOCABULARY = 5, 23


def language_batch(size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + size)
    ids = torch.randint(3, VOCABULARY, (size, TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (size, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


def language_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
    weights = batch["attention_mask"].to(losses.dtype)
    return (losses * weights).sum(1) / weights.sum(1)
