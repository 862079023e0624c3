"""The Sudoku experiment: its stages in order."""

from __future__ import annotations

from functools import partial

from reproduce.base import Outcome, Run
from reproduce.sudoku.config import Config

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
    split = measure.parts(config, measure.as_set(config, made))
    training = run.stage("training", partial(measure.train, config, split.train, run.checkpoints))
    paths = [run.checkpoints / name for name in training["checkpoints"]]
    accuracy = run.stage("accuracy", partial(measure.accuracy, config, paths[-1], split))
    used = len(config.influence_updates)
    influences = [
        run.stage(f"influence-{path.stem}", partial(measure.influence_at, config, path, split))
        for path in paths[-used:]
    ]
    exact = run.stage("exact", partial(measure.against_exact, config, paths[-1], split))
    influence = measure.total(influences, training["learning_rates"][-used:])
    return outcome(run, Found(split, int(made["multiple"]), training, accuracy, influences, influence, exact))
