"""Settings of the Sudoku experiment at each scale."""

from __future__ import annotations

from dataclasses import dataclass, field

from stepinfluence.arguments import positive_int

from reproduce.sudoku.model import SudokuConfig
from reproduce.sudoku.task import SudokuTrainConfig

Bin = tuple[int, int]


@dataclass(frozen=True)
class BlankCounts:
    """Numbers of blanks of generated puzzles: a normal distribution on the whole numbers ``low .. high``."""

    low: int
    high: int
    mean: float
    std: float


@dataclass(frozen=True)
class Config:
    """One run of the experiment.

    Args:
        seed: of the puzzles, the split, the training, the subsets and the sketches.
        data: folder of SATNet's ``features.pt`` and ``labels.pt`` (9 x 9 boards); None generates puzzles.
        puzzles: number of generated puzzles.
        blanks: their numbers of blanks.
        train: model and training; its own seed is replaced by ``seed``. ``train.model.steps`` is the analysis horizon.
        budgets: test-time loop steps.
        bins: test puzzles by blanks, easiest first; the first and the last are Table 1's easy and hard test puzzles.
        easy_at_most, hard_at_least: blanks of the easy and hard training groups of Table 1.
        influence_from: influence is summed over the checkpoints made after this update or a later one.
        sample: training puzzles, and as many test puzzles, to compute influence on (D.4).
        evaluations: how often influence is computed, each time on other puzzles and with other sketches of the same
            model; the report is of the first, and says how far the others agree.
        sketch_size: per parameter.
        exact: training and as many test puzzles on which sketched influence is compared with exact influence.
        batch_size: boards in a batch of the influence computation.

    Raises:
        ValueError: bins that are not in order, or no budget.
    """

    seed: int = 0
    data: str | None = None
    puzzles: int = 10_000
    blanks: BlankCounts = BlankCounts(39, 50, 44.3, 2.2)
    train: SudokuTrainConfig = field(default_factory=SudokuTrainConfig)
    budgets: tuple[int, ...] = (4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    bins: tuple[Bin, ...] = ((46, 47), (48, 48), (49, 50))
    easy_at_most: int = 42
    hard_at_least: int = 45
    influence_from: int = 0
    sample: int = 512
    evaluations: int = 1
    sketch_size: int = 2048
    exact: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("puzzles", "sample", "evaluations", "sketch_size", "exact", "batch_size"):
            positive_int(name, getattr(self, name))
        if not 0 <= self.influence_from <= self.train.updates:
            raise ValueError(f"influence_from: got {self.influence_from}; pass an update, 0 .. {self.train.updates}")
        edges = [edge for bounds in self.bins for edge in bounds]
        if len(self.bins) < 2 or edges != sorted(edges):
            raise ValueError(f"bins: got {self.bins}; pass at least two, in order of difficulty")
        if not self.budgets:
            raise ValueError("budgets: got none; pass numbers of loop steps")

    @property
    def influence_updates(self) -> tuple[int, ...]:
        """The checkpoints that influence is summed over, by their updates."""
        return tuple(update for update in self.train.checkpoint_updates if update >= self.influence_from)


def _small(**options: object) -> Config:
    """6 x 6 boards: 22 blanks or fewer to train on, more to test on (about a fifth)."""
    return Config(
        blanks=BlankCounts(14, 24, 20.0, 2.0),
        bins=((22, 22), (23, 23), (24, 24)),
        easy_at_most=18,
        hard_at_least=21,
        **options,  # type: ignore[arg-type]
    )


CONFIGS = {
    "minute": _small(
        puzzles=200,
        train=SudokuTrainConfig(
            model=SudokuConfig(2, 3, d_model=16, n_heads=2, positions="row_column_box", steps=4),
            updates=20,
            batch_size=16,
            mean_steps=4,
            max_steps=8,
            learning_rate=3e-3,
            warmup=5,
            checkpoints=2,
        ),
        budgets=(1, 2, 4, 8),
        sample=24,
        sketch_size=64,
        exact=8,
        batch_size=16,
    ),
    "cpu": _small(
        train=SudokuTrainConfig(
            model=SudokuConfig(2, 3, d_model=64, n_heads=4, positions="row_column_box", steps=8),
            updates=5000,
            batch_size=64,
            mean_steps=8,
            max_steps=16,
            learning_rate=2e-3,
            final_learning_rate=1e-4,
            checkpoints=10,
        ),
        budgets=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
        sample=256,
    ),
    # The paper's board, width and loop steps; trained for a tenth of the updates, and told which cells go together.
    # The loss is taken at every step, as by Yang et al.
    "hours": Config(
        train=SudokuTrainConfig(
            model=SudokuConfig(positions="row_column_box"),
            updates=10_000,
            first_mean_steps=6,
            rise_from=7500,
            rise=9500,
            loss_at="every",
            optimizer="muon",
            learning_rate=3e-3,
            final_learning_rate=1e-4,
            checkpoints=20,
        ),
        evaluations=3,
        influence_from=5000,  # before, it solves next to no board; at the end it knows the training puzzles by heart
    ),
    "paper": Config(),
}
"""``"paper"`` has what the paper states (D.3, D.4). It does not state optimizer, batch size, length of the training or
number of checkpoints: those are of Yang et al. (arXiv 2307.04895), whose model it follows: AdamW at 6e-4, 16 boards a
batch, 200 epochs; 20 checkpoints are our choice."""
