"""Settings of the parity experiment: smoke test, two-core machine, the paper's GPU run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stepinfluence.arguments import positive_int
from stepinfluence.models.parity import ParityConfig
from stepinfluence.models.parity_task import ParityTrainConfig


@dataclass(frozen=True)
class Config:
    """The parity experiment (paper D.2, Fig. 1).

    Attributes:
        training: the training run; its seed is replaced by ``seed``.
        test_length: bits of the test strings and of the probes; longer than any in training.
        accuracy_strings: held-out strings of ``test_length`` that accuracy is measured on; a quarter as many of each
            length of training.
        per_tercile, longest: training examples scored, from each third of the lengths and of the greatest length.
        test_examples: test strings scored.
        sketch_size: buckets for each parameter tensor.
        batch_size: examples of one attribution pass.
        lag: loop steps between the states compared by cosine.
        states: k of k-means.
        calibration, evaluation: alternating strings that the proxy's table is learned on and judged by.
        quantile: of the calibration distances: the threshold of the selective accuracy.
        beyond: the proxy is also judged by the alternating strings that are longer than ``test_length``, up to this.
        other_seeds: seeds of further training runs, whose forward pass is measured alike.
        device: where.
        seed: of everything else.
    """

    training: ParityTrainConfig
    test_length: int = 40
    accuracy_strings: int = 1024
    per_tercile: int = 128
    longest: int = 128
    test_examples: int = 384
    sketch_size: int = 2048
    batch_size: int = 64
    lag: int = 4
    states: int = 4
    calibration: int = 256
    evaluation: int = 1024
    quantile: float = 0.95
    beyond: int = 80
    other_seeds: tuple[int, ...] = ()
    device: str = "cpu"
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("accuracy_strings", "test_examples", "batch_size", "calibration", "evaluation"):
            positive_int(name, getattr(self, name))
        if self.test_length < max(8, self.lag + 2, self.states):
            raise ValueError(f"test_length: got {self.test_length}; a period needs at least 8 loop steps, and lag + 2")
        if self.beyond <= self.test_length:
            raise ValueError(f"beyond: got {self.beyond}; pass more than test_length={self.test_length}")
        if self.test_examples > self.accuracy_strings:
            raise ValueError(f"test_examples: got {self.test_examples} of accuracy_strings={self.accuracy_strings}")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile: got {self.quantile}; pass a share in 0 .. 1")
        if self.seed in self.other_seeds:
            object.__setattr__(self, "other_seeds", tuple(s for s in self.other_seeds if s != self.seed))

    def training_with(self, seed: int) -> ParityTrainConfig:
        """The training run with another seed."""
        return replace(self.training, seed=seed)


# The paper's lengths on a small model; checkpoints over the whole curriculum, none to choose from.
_SMALL = ParityTrainConfig(
    model=ParityConfig(d_model=48, n_heads=12),
    max_digits=20,
    min_steps=12,
    final_learning_rate=5e-5,
    betas=(0.9, 0.99),
    clip_norm=0.1,
    checkpoint_digits=(4, 8, 12, 16, 20),
)

# The paper's D.2 with the schedule of Fan et al. (arXiv 2409.15647), for a GPU: lengths up to 20 (their curriculum's
# bound of 21 is exclusive), one more bit every 500 steps, a cosine decay after the curriculum. One difference: they
# draw fresh strings for ever, here 10,000 of each length are fixed, so that an example can be named.
_PAPER = ParityTrainConfig(
    model=ParityConfig(),
    train_per_length=10_000,
    frontier_share=0.0,
    start_digits=1,
    threshold=None,
    min_steps=500,
    final_steps=90_000,
    max_steps=100_000,
    learning_rate=1e-4,
    final_learning_rate=1e-6,
    betas=(0.9, 0.999),
    clip_norm=1.0,
    warmup_steps=0,
)

CONFIGS = {
    "minute": Config(
        training=replace(
            _SMALL,
            model=ParityConfig(d_model=32, n_heads=4),
            max_digits=6,
            train_per_length=32,
            threshold=None,  # one more bit every min_steps, whatever the accuracy
            min_steps=15,
            final_steps=20,
            checkpoint_digits=(4,),
        ),
        test_length=10,
        accuracy_strings=64,
        per_tercile=12,
        longest=12,
        test_examples=16,
        sketch_size=256,
        calibration=64,
        evaluation=128,
        beyond=14,
        other_seeds=(1,),
    ),
    # Many strings (the paper draws fresh ones for ever) and a long final phase: both help at lengths beyond training's.
    "cpu": Config(training=replace(_SMALL, train_per_length=4096, final_steps=800), other_seeds=(1, 2)),
    # The paper's width and heads. At width 256 the curriculum takes a learning rate of 4e-4 in some 500 steps.
    "hours": Config(
        training=replace(
            _SMALL,
            model=ParityConfig(),
            train_per_length=4096,
            learning_rate=4e-4,
            final_steps=1600,
            final_learning_rate=2e-5,
            checkpoint_digits=(4, 8, 12, 16, 20),
            final_checkpoints=7,
        ),
    ),
    "paper": Config(training=_PAPER, accuracy_strings=6400, other_seeds=(1, 2), device="cuda"),
}
