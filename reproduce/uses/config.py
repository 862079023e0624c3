"""Settings of the experiment ``uses``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reproduce.planted.config import Config as Planted


@dataclass(frozen=True)
class Config:
    """One run. The summary gives no protocol; all of this is ours.

    Attributes:
        planted: model, training and sizes, as in the experiment ``planted``.
        task: of that experiment; taught models show its state after every step.
        seeds: of data and training both; intervals are over them.
        wrong: examples that are wrong late, and as many that are wrong early.
        queries: held-out examples.
        seed: the first of the seeds.
    """

    planted: Planted
    task: str = "sorting"
    seeds: int = 3
    wrong: int = 24
    queries: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError("seeds: an interval needs at least two")

    def of_seed(self, seed: int) -> Planted:
        """The planted experiment's settings with another seed."""
        return replace(self.planted, seed=seed)


CONFIGS = {
    "minute": Config(
        planted=Planted(
            d_model=16, n_heads=2, train_steps=20, taught_steps=20, examples=32, plain_queries=8, energy_examples=16
        ),
        seeds=2,
        wrong=6,
        queries=8,
    ),
    "cpu": Config(planted=Planted(taught_steps=900, energy_examples=100, plain_queries=48)),
    # No configuration of the paper's: what the same questions may look like on a GPU. Not run so far.
    "paper": Config(
        planted=Planted(
            large=True, d_model=256, n_heads=8, train_steps=20_000, taught_steps=50_000, batch_size=256,
            learning_rate=5e-4, examples=20_000, plain_queries=512, energy_examples=2_000,
        ),
        seeds=5,
        wrong=1_000,
        queries=512,
    ),
}  # fmt: skip
