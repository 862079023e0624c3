"""Settings of the looped language model experiment: smoke test, two-core machine, GSM8K on it, the paper's GPU run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stepinfluence.models.gpt import LoopedGPTConfig

from reproduce.nanochat.text import ByteTokenizer

Adapter = Literal["prelude", "random"]


@dataclass(frozen=True)
class Variant:
    """A model to set beside the others; the first of a run is the paper's protocol.

    Attributes:
        name: in figures and file names.
        adapter: how the injection adapter starts: ``"prelude"`` passes the prelude output on and ignores the state,
            as the public recursive nanochat does; ``"random"`` mixes both.
        norm_state: normalise the state after each step. The prelude output is not normalised, so it soon outweighs such
            a state in the adapter.
        bptt_k: loop steps that training backpropagates through; None for all.
        trained: False leaves the weights as they were drawn.
        horizons: loop counts that SDI is computed at; empty for the run's.
    """

    name: str
    adapter: Adapter = "prelude"
    norm_state: bool = False
    bptt_k: int | None = 4
    trained: bool = True
    horizons: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name as files and stages have it."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class StageConfig:
    """A stage of training.

    Attributes:
        updates: optimizer steps; 0 leaves the stage out.
        checkpoints: saved at even distances, the last at the end; influence is summed over those of the last stage.
    """

    updates: int
    checkpoints: int


@dataclass(frozen=True)
class Config:
    """The looped language model experiment (paper D.5).

    Attributes:
        model: architecture; ``vocab_size`` must be the tokenizer's.
        questions_as_text: pretrain on what the users of the training conversations say, too.
        spelling_tasks: made for mid-training (:mod:`reproduce.nanochat.spelling`).
        tokenizer: ``"bytes"``, or ``"bpe"`` trained on the data.
        pretraining: on documents.
        mid_training: on the conversations and spelling tasks, next-token loss over all tokens.
        fine_tuning: on conversations, where the user's data has some; only what the assistant says counts.
        batch: examples per update.
        mean_loops, max_loops: of the Poisson-log-normal loop counts in training.
        matrix_lr, embedding_lr, head_lr: nanochat's, the last two for a width of 768 and scaled from there.
        horizons: loop counts (tau) that SDI is computed at.
        stride: influence is summed over every ``stride``-th checkpoint, counted from the last.
        dense: loop counts at which it is summed over all checkpoints, whatever the stride.
        curvature: score by the damped Fisher of each checkpoint, too (docs/curvature.md).
        train_examples, query_examples: sampled for influence; 1024 each in the paper.
        score_batch: examples at a time when influence is computed.
        sketch_size: m.
        variants: the protocol first, then what it is compared with.
        data: JSON lines of the user, or a folder of them (:mod:`reproduce.nanochat.text`); Python's language reference
            without.
        device: where.
        seed: of everything.
    """

    model: LoopedGPTConfig
    pretraining: StageConfig
    fine_tuning: StageConfig
    mid_training: StageConfig = StageConfig(0, 0)
    questions_as_text: bool = False
    spelling_tasks: int = 0
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    batch: int = 16
    mean_loops: float = 4.0
    max_loops: int = 16
    matrix_lr: float = 0.02
    embedding_lr: float = 0.2
    head_lr: float = 0.004
    horizons: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16)
    stride: int = 1
    dense: tuple[int, ...] = ()
    curvature: bool = False
    train_examples: int = 64
    query_examples: int = 48
    score_batch: int = 8
    sketch_size: int = 2048
    variants: tuple[Variant, ...] = (Variant("protocol"),)
    data: str | None = None
    device: str = "cpu"
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.tokenizer == "bytes" and self.model.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(
                f"model: got vocab_size {self.model.vocab_size}; bytes make {ByteTokenizer.vocab_size} tokens"
            )
        if len({v.name for v in self.variants}) != len(self.variants) or not self.variants:
            raise ValueError("variants: pass at least one, each with a name of its own")
        if not self.variants[0].trained:
            raise ValueError("variants: the first is the protocol; it must be trained")
        if min(self.horizons) < 1 or self.pretraining.updates < 1:
            raise ValueError("horizons, pretraining: loop counts and updates begin at 1")
        if self.stride < 1 or self.spelling_tasks < 0:
            raise ValueError("stride, spelling_tasks: pass a stride of at least 1 and no negative number of tasks")


def _model(d_model: int, n_heads: int, tokens: int, vocab_size: int = ByteTokenizer.vocab_size) -> LoopedGPTConfig:
    return LoopedGPTConfig(
        vocab_size=vocab_size, d_model=d_model, n_heads=n_heads, sequence_len=tokens, steps=4,
        initial_state="prelude", norm_state=False, zero_init=True,
    )  # fmt: skip


_FEW = (4, 16)
CONTROLS = (
    Variant("full backpropagation", bptt_k=None, horizons=_FEW),
    Variant("normalised state", norm_state=True, horizons=_FEW),
    Variant("random adapter", adapter="random", horizons=_FEW),
    Variant("untrained", adapter="random", trained=False, horizons=_FEW),
)

CONFIGS = {
    "minute": Config(
        model=_model(16, 2, 24),
        pretraining=StageConfig(updates=6, checkpoints=2),
        fine_tuning=StageConfig(updates=4, checkpoints=2),
        batch=4,
        max_loops=5,
        horizons=(2, 4),
        train_examples=6,
        query_examples=5,
        sketch_size=64,
        variants=(Variant("protocol"), Variant("untrained", adapter="random", trained=False)),
    ),
    "cpu": Config(
        model=_model(64, 4, 96),
        pretraining=StageConfig(updates=320, checkpoints=3),
        fine_tuning=StageConfig(updates=120, checkpoints=3),
        batch=12,
        train_examples=48,
        query_examples=36,
        variants=(Variant("protocol"), *CONTROLS),
    ),
    # The paper's three stages in miniature. One conversation a batch makes many updates of little time; nanochat's
    # learning rate of the embedding is too large for so small a batch.
    "gsm8k": Config(
        model=_model(96, 4, 320, vocab_size=4096),
        pretraining=StageConfig(updates=3000, checkpoints=1),
        mid_training=StageConfig(updates=3000, checkpoints=1),
        fine_tuning=StageConfig(updates=4000, checkpoints=20),
        questions_as_text=True,
        spelling_tasks=4000,
        tokenizer="bpe",
        batch=1,
        embedding_lr=0.05,
        horizons=(2, 3, 4, 6, 8, 12, 16),
        stride=4,
        dense=(4,),
        curvature=True,
        train_examples=24,
        query_examples=24,
        variants=(Variant("protocol"), Variant("untrained", adapter="random", trained=False)),
    ),
    # Mid-training and fine-tuning of the paper are one stage here, on the conversations of the user's file.
    "paper": Config(
        model=LoopedGPTConfig.nanochat(),
        pretraining=StageConfig(updates=21_400, checkpoints=1),
        fine_tuning=StageConfig(updates=1_420, checkpoints=71),
        tokenizer="bpe",
        batch=32,
        horizons=(2, 3, 4, 6, 8, 10, 12, 14, 16),
        train_examples=1024,
        query_examples=1024,
        variants=(Variant("protocol"),),
        device="cuda",
    ),
}
