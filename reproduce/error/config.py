"""Settings of the experiment ``error``."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepinfluence.models.gpt import LoopedGPTConfig

from sdi_kernels import HashFamily


@dataclass(frozen=True)
class DepthConfig:
    """Error against the number of loop steps.

    Attributes:
        loops: values of tau; the same weights are run at each.
        mean_loops: of the loop counts that the trained models are trained with, at most four times as many.
        examples: every one is training example and query at once.
        draws: sketches of each family.
    """

    loops: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    mean_loops: int = 8
    examples: int = 8
    draws: int = 8


@dataclass(frozen=True)
class SparsityConfig:
    """Error against the sparsity of gradients.

    Attributes:
        shares: of each matrix's entries (or rows, or columns) that are kept; the others are set to zero.
        active: hidden units of the MLP that a token may use, for models that are sparse by themselves.
        examples, draws: as for :class:`DepthConfig`.
    """

    shares: tuple[float, ...] = (1, 1 / 4, 1 / 16, 1 / 64, 1 / 256)
    active: tuple[int, ...] = (128, 16, 2)
    examples: int = 8
    draws: int = 8


@dataclass(frozen=True)
class LemmaConfig:
    """Lemma 1 (eq. 12) by Monte Carlo.

    Attributes:
        checkpoints: values of K; the largest is how many checkpoints are taken, at even distances.
        examples: training examples, and as many queries.
        draws: of the hash tables.
        tight_size: side of the matrices of ones that come close to the bound.
        tight_draws: of their tables.
    """

    checkpoints: tuple[int, ...] = (1, 2, 4, 8)
    examples: int = 6
    draws: int = 200
    tight_size: int = 64
    tight_draws: int = 3000

    def __post_init__(self) -> None:
        if any(max(self.checkpoints) % k for k in self.checkpoints):
            raise ValueError(f"checkpoints: got {self.checkpoints}; each must divide the largest")


@dataclass(frozen=True)
class SearchConfig:
    """Nearly orthogonal pairs: error, and recall of the most helpful training examples.

    Attributes:
        train, queries: examples.
        sizes: values of m.
        draws: sketches of each size and family.
        top: how many training examples are asked for.
        candidates: lengths of the list that is re-ranked exactly; ``top`` is no re-ranking.
        cosines: borders of the bins of ``|cos(g, p_t)|``.
    """

    train: int = 320
    queries: int = 24
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    draws: int = 4
    top: int = 10
    candidates: tuple[int, ...] = (10, 20, 40, 80, 160)
    cosines: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        if self.candidates[0] != self.top or self.candidates[-1] > self.train:
            raise ValueError(f"candidates: got {self.candidates}; begin with top={self.top}, end by train={self.train}")


@dataclass(frozen=True)
class Config:
    """One run. Neither the paper nor its summary has these experiments; all of this is ours.

    Attributes:
        model: the looped model; its ``steps`` are those of everything but ``depth``.
        modulus: the task is to add neighbouring digits, modulo this.
        updates, batch, learning_rate: of AdamW; the rate falls linearly to a tenth after a short warm-up.
        seeds: models of each kind; intervals are over them.
        sketch_size: the m of what does not vary it. Beside the widths it is what 1,500 is at the paper's.
        depth, sparsity, lemma, search: the four parts.
        seed: of the first model, of data and sketches.
    """

    model: LoopedGPTConfig
    modulus: int = 5
    updates: int = 200
    batch: int = 32
    learning_rate: float = 5e-3
    seeds: int = 3
    sketch_size: int = 64
    depth: DepthConfig = field(default_factory=DepthConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    lemma: LemmaConfig = field(default_factory=LemmaConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.modulus > self.model.vocab_size:
            raise ValueError(f"modulus: got {self.modulus}; the model has {self.model.vocab_size} tokens")
        if self.seeds < 2:
            raise ValueError("seeds: an interval needs at least two models")
        if max(self.sparsity.active) > self.model.mlp_ratio * self.model.d_model:
            raise ValueError(f"active: got {self.sparsity.active}; the MLP has fewer hidden units")


FAMILIES: tuple[HashFamily, ...] = ("balanced", "iid", "block")


def _model(d_model: int, tokens: int, *, steps: int = 8) -> LoopedGPTConfig:
    """One block with an injection adapter; the gains of its norms are vectors, which a CountSketch takes."""
    return LoopedGPTConfig(
        vocab_size=8, d_model=d_model, n_heads=2, sequence_len=tokens, n_prelude=0, n_core=1, n_coda=0, steps=steps,
        norm="rmsnorm",
    )  # fmt: skip


CONFIGS = {
    "minute": Config(
        model=_model(8, 6, steps=3),
        updates=5,
        batch=8,
        seeds=2,
        sketch_size=16,
        depth=DepthConfig(loops=(2, 4), mean_loops=2, examples=4, draws=4),
        sparsity=SparsityConfig(shares=(1, 1 / 8), active=(32, 4), examples=4, draws=4),
        lemma=LemmaConfig(checkpoints=(1, 2), examples=3, draws=40, tight_size=16, tight_draws=200),
        search=SearchConfig(train=16, queries=4, sizes=(16, 32), draws=2, top=2, candidates=(2, 4, 8)),
    ),
    "cpu": Config(model=_model(32, 12)),
    # No configuration of the paper's: what the same questions may look like on a GPU. Not run so far.
    "paper": Config(
        model=_model(128, 32),
        updates=4000,
        batch=128,
        learning_rate=1e-3,
        seeds=5,
        sketch_size=256,
        depth=DepthConfig(examples=16, draws=20),
        sparsity=SparsityConfig(active=(512, 128, 32, 8, 2), examples=16, draws=20),
        lemma=LemmaConfig(draws=2000),
        search=SearchConfig(train=4096, queries=64, sizes=(64, 128, 256, 512, 1024, 2048, 4096)),
    ),
}
