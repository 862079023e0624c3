"""Settings of the fidelity experiment: smoke test, two-core machine, the paper's GPU run."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepinfluence.models.gpt import LoopedGPTConfig

GIB = 2**30
PAPER_SIZES = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class TimingConfig:
    """What is timed: a model, a batch, and how often.

    Attributes:
        model: architecture; its ``steps`` are the loop steps run.
        batch: examples per pass; 40 in the paper.
        rounds: repetitions; contestants alternate within a round.
    """

    model: LoopedGPTConfig
    batch: int
    rounds: int


@dataclass(frozen=True)
class MemoryConfig:
    """The search for the largest batch that fits.

    Attributes:
        model: architecture.
        limit: bytes a process may use, model included.
        step: batch sizes are multiples of this; 4 in the paper.
        ceiling: largest batch tried.
        methods: of :data:`~reproduce.fidelity.memory.METHODS`.
    """

    model: LoopedGPTConfig
    limit: int
    step: int = 4
    ceiling: int = 256
    methods: tuple[str, ...] = ("training step", "full gradients", "sketches", "sketches, checkpointed")


@dataclass(frozen=True)
class Config:
    """The fidelity and scalability experiment (paper D.1).

    Attributes:
        model: the model whose scores are compared.
        batch: examples; every one is training example and query at once.
        sketch_sizes: values of m.
        sketch_seeds: number of independent sketches of each size.
        reference_size: the m that single figures are given for.
        checked_examples: examples whose features from the library are compared with tape and autograd.
        timing, memory: what is timed and how memory is searched.
        device: where; sketches of the tape fit 24 GB at the paper's size.
        seed: of weights, tokens, and the first of the sketch seeds.
    """

    model: LoopedGPTConfig
    timing: TimingConfig
    memory: MemoryConfig
    batch: int = 4
    sketch_sizes: tuple[int, ...] = PAPER_SIZES
    sketch_seeds: int = 10
    reference_size: int = 2048
    checked_examples: int = 2
    device: str = "cpu"
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.reference_size not in self.sketch_sizes:
            raise ValueError(f"reference_size: got {self.reference_size}; pass one of {self.sketch_sizes}")
        if len(set(self.sketch_sizes)) < 2 or self.sketch_seeds < 2:
            raise ValueError("sketch_sizes, sketch_seeds: a slope and a spread need at least two of each")
        if not 1 <= self.checked_examples <= self.batch:
            raise ValueError(f"checked_examples: got {self.checked_examples}; pass 1 .. batch={self.batch}")


_PAPER = LoopedGPTConfig.paper()
_TINY = LoopedGPTConfig.tiny()

CONFIGS = {
    "minute": Config(
        model=_TINY,
        timing=TimingConfig(_TINY, batch=4, rounds=2),
        memory=MemoryConfig(_TINY, limit=GIB, ceiling=4, methods=("full gradients", "sketches")),
        sketch_sizes=(64, 128, 256),
        sketch_seeds=3,
        reference_size=128,
    ),
    # Scores at the paper's own size: one tape of activations serves every sketch. Cost grows linearly with the loop
    # steps, so eight of them time as well as 32. Memory has a smaller model, as exact gradients would need 15 GB.
    "cpu": Config(
        model=_PAPER,
        timing=TimingConfig(LoopedGPTConfig(steps=8), batch=4, rounds=3),
        memory=MemoryConfig(
            LoopedGPTConfig(vocab_size=1024, d_model=256, n_heads=4, sequence_len=64, steps=8), limit=2 * GIB
        ),
    ),
    "paper": Config(
        model=_PAPER,
        timing=TimingConfig(_PAPER, batch=40, rounds=10),
        memory=MemoryConfig(_PAPER, limit=48 * 10**9, ceiling=1024),
        device="cuda",
    ),
}
