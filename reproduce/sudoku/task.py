"""Sudoku (paper D.3, D.4): puzzles with one solution, the split by difficulty, training with random loop counts.

data = generate(blank_counts(39, 50, 44.3, 2.2, 10_000))    # or load_satnet("path/to/sudoku")
train, test = split_by_difficulty(data)                     # easiest 80 %, hardest 20 %
result = train_sudoku(SudokuTrainConfig(), train, Path("checkpoints"))
solved_by_steps(result.model, test, [4, 8, 16, 32, 64])     # (n_test, 5)
"""

from __future__ import annotations

from reproduce.sudoku.data import (
    SudokuSet,
    blanks_right_by_steps,
    equal_quotas,
    load_satnet,
    solved_by_steps,
    split_by_difficulty,
    stratified_subset,
)
from reproduce.sudoku.generate import Rules, blank_counts, count_multiple, generate
from reproduce.sudoku.training import SudokuTrainConfig, SudokuTraining, new_model, train_sudoku

__all__ = [
    "Rules",
    "SudokuSet",
    "SudokuTrainConfig",
    "SudokuTraining",
    "blank_counts",
    "blanks_right_by_steps",
    "count_multiple",
    "equal_quotas",
    "generate",
    "load_satnet",
    "new_model",
    "solved_by_steps",
    "split_by_difficulty",
    "stratified_subset",
    "train_sudoku",
]
