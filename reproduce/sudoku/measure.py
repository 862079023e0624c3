"""The work of the Sudoku experiment: puzzles, training, accuracy by loop steps, influence, its check against exact."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stepinfluence import Capture, ExactCapture, attach, influence, load_checkpoint

from reproduce.sudoku.model import SudokuTransformer, sudoku_loss
from reproduce.sudoku.task import (
    SudokuSet,
    SudokuTrainConfig,
    blank_counts,
    blanks_right_by_steps,
    count_multiple,
    generate,
    load_satnet,
    solved_by_steps,
    split_by_difficulty,
    stratified_subset,
    train_sudoku,
)

if TYPE_CHECKING:
    from stepinfluence.attribution.features import Features

    from reproduce.sudoku.config import Config

Arrays = dict[str, Any]


def device() -> str:
    """Where everything runs: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def puzzles(config: Config) -> Arrays:
    """SATNet's puzzles or generated ones, and how many of them have more than one solution."""
    model = config.train.model
    if config.data is not None:
        if (model.box_rows, model.box_columns) != (3, 3):
            raise ValueError("data: SATNet's boards are 9 x 9, this scale's are smaller; use --scale paper")
        data = load_satnet(config.data)
    else:
        b = config.blanks
        counts = blank_counts(b.low, b.high, b.mean, b.std, config.puzzles, seed=config.seed)
        data = generate(counts, model.box_rows, model.box_columns, seed=config.seed)
    return {"puzzles": data.puzzles, "solutions": data.solutions, "multiple": count_multiple(data)}


def as_set(config: Config, values: Any) -> SudokuSet:
    """The puzzles of :func:`puzzles` again."""
    model = config.train.model
    ids = np.arange(len(values["puzzles"]))
    return SudokuSet(values["puzzles"], values["solutions"], model.box_rows, model.box_columns, ids)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The split, and the subsets that influence is computed on."""

    train: SudokuSet
    test: SudokuSet
    train_sample: SudokuSet
    test_sample: SudokuSet


def parts(config: Config, data: SudokuSet, evaluation: int = 0) -> Parts:
    """Split by difficulty (D.3) and draw the subsets (D.4) of one of the evaluations."""
    train, test = split_by_difficulty(data, seed=config.seed)
    samples = [stratified_subset(part, config.sample, seed=config.seed + evaluation) for part in (train, test)]
    return Parts(train, test, *samples)


def train_config(config: Config) -> SudokuTrainConfig:
    """The training with the run's seed."""
    return dataclasses.replace(config.train, seed=config.seed)


def train(config: Config, data: SudokuSet, folder: Path) -> Arrays:
    """Train; the checkpoints stay in the folder, so that an interrupted training goes on."""
    result = train_sudoku(train_config(config), data, folder, device=device(), progress=sys.stderr.isatty())
    return {
        "losses": result.losses.numpy(),
        "loop_counts": result.loop_counts.numpy(),
        "checkpoints": [path.name for path in result.checkpoints],
        "learning_rates": list(result.learning_rates),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "body_parameters": sum(p.numel() for p in result.model.block.parameters()),
    }


def load_model(config: Config, path: Path) -> SudokuTransformer:
    """The model at a checkpoint, in eval mode."""
    model = SudokuTransformer(config.train.model)
    load_checkpoint(path).load_into(model)
    return model.to(device()).eval()


def accuracy(config: Config, path: Path, split: Parts) -> Arrays:
    """Which test boards, and which of as many training boards, are solved after each number of loop steps."""
    model = load_model(config, path)
    some = split.train.take(range(min(len(split.train), len(split.test))))
    return {
        "test": solved_by_steps(model, split.test, config.budgets),
        "train": solved_by_steps(model, some, config.budgets),
    }


def blanks_right(config: Config, path: Path, split: Parts) -> Arrays:
    """Share of each test board's blanks that is right after each number of loop steps."""
    return {"test": blanks_right_by_steps(load_model(config, path), split.test, config.budgets)}


def influence_at(config: Config, path: Path, split: Parts, evaluation: int = 0) -> Arrays:
    """Influence at one checkpoint, without its learning rate: SDI, TracIn (from summed features) and self-influence.

    Sketches are of the evaluation's own hashes.

    ``sdi`` is float32 ``(n_train, n_query, steps)``, ``tracin`` ``(n_train, n_query)``, ``self`` ``(n_train,)``.
    """
    model = load_model(config, path)
    capture = attach(model, body=model.block, sketch_size=config.sketch_size, seed=config.seed + evaluation)
    return _influence(config, capture, split.train_sample, split.test_sample)


def _influence(config: Config, capture: Capture | ExactCapture, train: SudokuSet, test: SudokuSet) -> Arrays:
    ours = _featurize(config, capture, train, per_step=False)
    theirs = _featurize(config, capture, test, per_step=True)
    # Summed before the product: what conservation (D.4) is checked against.
    tracin = ours.values @ theirs.summed().values.T
    return {
        "sdi": influence(ours, theirs).sdi.cpu().numpy(),
        "tracin": tracin.cpu().numpy(),
        "self": (ours.values**2).sum(1).cpu().numpy(),
    }


def _featurize(config: Config, capture: Capture | ExactCapture, data: SudokuSet, *, per_step: bool) -> Features:
    return capture.featurize(
        data.batches(config.batch_size, device()),
        sudoku_loss,
        per_step=per_step,
        ids=lambda batch: batch["ids"],
        progress=False,
    )


def total(parts: Sequence[Any], learning_rates: Sequence[float]) -> Arrays:
    """Influence summed over checkpoints, each by its learning rate (paper, eqs. 1 and 5)."""
    result: Arrays = {}
    for key in ("sdi", "tracin", "self"):
        result[key] = np.zeros(parts[0][key].shape)  # float64: nothing is lost in the sum
        for part, rate in zip(parts, learning_rates, strict=True):
            result[key] += rate * part[key]
    return result


def against_exact(config: Config, path: Path, split: Parts) -> Arrays:
    """Sketched and exact influence of some training puzzles on some test puzzles at one checkpoint."""
    model = load_model(config, path)
    train, test = (
        stratified_subset(p, config.exact, seed=config.seed) for p in (split.train_sample, split.test_sample)
    )
    sketched = attach(model, body=model.block, sketch_size=config.sketch_size, seed=config.seed)
    small = dataclasses.replace(config, batch_size=min(config.batch_size, 8))  # exact gradients take the room
    result: Arrays = {"test_blanks": test.blanks, "train_blanks": train.blanks}
    for name, capture in (("sketched", sketched), ("exact", ExactCapture(model, body=model.block))):
        values = _influence(small, capture, train, test)
        result |= {f"{name}_{key}": value for key, value in values.items()}
    return result
