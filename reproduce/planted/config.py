"""Settings of the experiment ``planted``."""

from __future__ import annotations

from dataclasses import dataclass

from reproduce.planted.tasks.addition import Addition
from reproduce.planted.tasks.copying import Copying
from reproduce.planted.tasks.running_parity import RunningParity
from reproduce.planted.tasks.sorting import Sorting
from reproduce.planted.tasks.step_task import StepTask

LARGEST = {"copy": 16, "addition": 15, "sorting": 16, "parity": 17}
SMALL = {"copy": 5, "addition": 5, "sorting": 6, "parity": 10}


@dataclass(frozen=True)
class Config:
    """One run. The summary publishes no protocol; all of this is ours.

    Attributes:
        seed: of data, weights, batches, sketches and statistics.
        tasks: names.
        large: longer inputs, more loop steps (a GPU's).
        d_model, n_heads: of the model.
        train_steps, batch_size, learning_rate: of AdamW; the rate falls linearly to a tenth after a short warm-up.
        taught_steps: training steps of the models that are taught every step of the algorithm, which takes longer.
        examples: ordinary training examples.
        mislabelled: further ones with a wrong answer.
        families: queries with copies in the training set, and as many whose copies have a wrong answer.
        copies: of each of those queries.
        rule_examples: the only training examples of the rule.
        rule_queries: queries that need the rule.
        plain_queries: held-out queries that nothing was planted for.
        energy_examples: training examples that the energy of a query is summed over.
        checkpoints: shares of training after which there is one.
        sketch_sizes: m, buckets per parameter; the last is the one used where one is needed.
        removed: examples taken away in a retraining.
        retrain_seeds: retrainings of each kind.
        resamples: permutations and bootstrap resamples.
    """

    seed: int = 0
    tasks: tuple[str, ...] = ("copy", "addition", "sorting", "parity")
    large: bool = False
    d_model: int = 32
    n_heads: int = 4
    train_steps: int = 600
    taught_steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 3e-3
    examples: int = 400
    mislabelled: int = 24
    families: int = 12
    copies: int = 3
    rule_examples: int = 32
    rule_queries: int = 12
    plain_queries: int = 64
    energy_examples: int = 200
    checkpoints: tuple[float, ...] = (0.2, 0.5, 1.0)
    sketch_sizes: tuple[int, ...] = (16, 64, 256)
    removed: int = 36
    retrain_seeds: int = 3
    resamples: int = 2000


CONFIGS = {
    "minute": Config(
        tasks=("sorting",),
        d_model=16,
        n_heads=2,
        train_steps=20,
        taught_steps=20,
        examples=32,
        mislabelled=4,
        families=2,
        copies=2,
        rule_examples=4,
        rule_queries=3,
        plain_queries=8,
        energy_examples=16,
        checkpoints=(0.5, 1.0),
        sketch_sizes=(8, 16),
        removed=6,
        retrain_seeds=2,
        resamples=50,
    ),
    "cpu": Config(),
    # The summary gives no configuration. This one is what the same protocol may look like on a GPU; not run so far.
    "paper": Config(
        large=True,
        d_model=256,
        n_heads=8,
        train_steps=20_000,
        taught_steps=50_000,
        batch_size=256,
        learning_rate=5e-4,
        examples=20_000,
        mislabelled=1_000,
        families=100,
        copies=5,
        rule_examples=200,
        rule_queries=100,
        plain_queries=512,
        energy_examples=2_000,
        sketch_sizes=(256, 512, 1024, 2048),
        removed=500,
        retrain_seeds=8,
        resamples=10_000,
    ),
}


def make_task(name: str, *, large: bool) -> StepTask:
    """A task by name, small or large.

    Raises:
        ValueError: unknown name.
    """
    size = (LARGEST if large else SMALL).get(name)
    if name == "copy" and size:
        return Copying(size, symbols=26 if large else 8)
    if name == "addition" and size:
        return Addition(size, base=10 if large else 6)
    if name == "sorting" and size:
        return Sorting(size, values=32 if large else 8)
    if name == "parity" and size:
        return RunningParity(size)
    raise ValueError(f"name: got {name!r}; use one of {', '.join(SMALL)}")
