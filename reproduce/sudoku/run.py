"""The Sudoku experiment: its stages in order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reproduce.base import Outcome, Run
from reproduce.sudoku.config import Config

if TYPE_CHECKING:
    from reproduce.sudoku.analyse import Evaluation
    from reproduce.sudoku.task import SudokuSet

REQUIRES = ("sudoku", ("pysat",))
"""Extra to install, and the modules that it brings."""


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated.

    Raises:
        ImportError: PySAT is not installed.
        ValueError: the user's data are not SATNet's tensors, or a difficulty bin is empty.
    """
    from reproduce.sudoku import measure
    from reproduce.sudoku.analyse import Found, outcome

    config = run.config
    made = run.stage("puzzles", partial(measure.puzzles, config))
    data = measure.as_set(config, made)
    split = measure.parts(config, data)
    training = run.stage("training", partial(measure.train, config, split.train, run.checkpoints))
    paths = [run.checkpoints / name for name in training["checkpoints"]]
    accuracy = run.stage("accuracy", partial(measure.accuracy, config, paths[-1], split))
    blanks = run.stage("blanks-right", partial(measure.blanks_right, config, paths[-1], split))
    rates = training["learning_rates"][-len(config.influence_updates) :]
    evaluations = [_evaluate(run, data, paths[-len(rates) :], rates, number) for number in range(config.evaluations)]
    exact = run.stage("exact", partial(measure.against_exact, config, paths[-1], split))
    return outcome(run, Found(int(made["multiple"]), training, accuracy, blanks, evaluations, exact))


def _evaluate(
    run: Run[Config], data: SudokuSet, paths: Sequence[Path], rates: Sequence[float], number: int
) -> Evaluation:
    from reproduce.sudoku import measure
    from reproduce.sudoku.analyse import Evaluation

    split = measure.parts(run.config, data, number)
    which = f"-evaluation-{number}" if number else ""
    parts = [
        run.stage(f"influence-{path.stem}{which}", partial(measure.influence_at, run.config, path, split, number))
        for path in paths
    ]
    return Evaluation(split, rates, parts, measure.total(parts, rates))
