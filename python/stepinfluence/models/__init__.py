"""Looped transformers to attribute: the looped GPT of the paper's D.1, the parity model of D.2 and its task."""

from __future__ import annotations

from stepinfluence.models.blocks import Block, BlockConfig
from stepinfluence.models.gpt import LoopedCore, LoopedGPT, LoopedGPTConfig, gpt_loss, sample_loop_counts
from stepinfluence.models.parity import (
    AnswerTrajectory,
    ParityConfig,
    ParityLoopBody,
    ParityTransformer,
    parity_loss,
)

__all__ = [
    "AnswerTrajectory",
    "Block",
    "BlockConfig",
    "LoopedCore",
    "LoopedGPT",
    "LoopedGPTConfig",
    "ParityConfig",
    "ParityLoopBody",
    "ParityTransformer",
    "gpt_loss",
    "parity_loss",
    "sample_loop_counts",
]
