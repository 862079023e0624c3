"""Sudoku: puzzles have one solution, the split leaks nothing, a run that was interrupted is the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence import load_checkpoint

from reproduce.sudoku.model import SudokuConfig, SudokuTransformer, units
from reproduce.sudoku.task import (
    Rules,
    SudokuSet,
    SudokuTrainConfig,
    blank_counts,
    blanks_right_by_steps,
    count_multiple,
    equal_quotas,
    generate,
    load_satnet,
    solved_by_steps,
    split_by_difficulty,
    stratified_subset,
    train_sudoku,
)

# Two completions of this board: the 1 and 2 of two rows and columns can change places.
SQUARE = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
AMBIGUOUS = [0, 0, 3, 4, 3, 4, 1, 2, 0, 0, 4, 3, 4, 3, 2, 1]


@pytest.fixture(scope="module")
def small() -> SudokuSet:
    return generate(blank_counts(14, 24, 20.0, 2.0, 60, seed=3), 2, 3, seed=3)


def brute_force(board: list[int], box_rows: int, box_columns: int) -> int:
    """Number of completions, by trying everything: shares nothing with the solver."""
    side = box_rows * box_columns
    if 0 not in board:
        return 1
    cell = board.index(0)
    row, column = divmod(cell, side)
    seen = set()
    for other, value in enumerate(board):
        r, c = divmod(other, side)
        same_box = (r // box_rows, c // box_columns) == (row // box_rows, column // box_columns)
        if r == row or c == column or same_box:
            seen.add(value)
    return sum(
        brute_force([*board[:cell], value, *board[cell + 1 :]], box_rows, box_columns)
        for value in range(1, side + 1)
        if value not in seen
    )


def test_solutions_are_counted_as_by_trying_everything() -> None:
    with Rules(2, 2) as rules:
        assert rules.count(AMBIGUOUS) == brute_force(AMBIGUOUS, 2, 2) == 2
        assert rules.count(SQUARE) == 1
        assert rules.count([0] * 16, limit=300) == 288  # all boards of 4 x 4
        assert rules.count([1, 1, *[0] * 14]) == 0
        assert rules.count(AMBIGUOUS) == 2  # what was counted before is forgotten


@pytest.mark.parametrize(("box_rows", "box_columns", "blanks"), [(2, 2, [6, 9, 10]), (2, 3, [14, 20, 24])])
def test_generated_puzzles_have_the_blanks_asked_for_and_one_solution(
    box_rows: int, box_columns: int, blanks: list[int]
) -> None:
    made = generate(blanks, box_rows, box_columns, seed=1)
    assert made.blanks.tolist() == blanks
    assert [brute_force(board.tolist(), box_rows, box_columns) for board in made.puzzles] == [1, 1, 1]
    again = generate(blanks, box_rows, box_columns, seed=1)
    np.testing.assert_array_equal(again.puzzles, made.puzzles)
    other = generate(blanks, box_rows, box_columns, seed=2)
    assert not np.array_equal(other.puzzles, made.puzzles)


def test_nine_by_nine_reaches_the_papers_hardest() -> None:
    made = generate([39, 50], seed=0)
    assert made.blanks.tolist() == [39, 50]
    assert count_multiple(made) == 0


def test_puzzles_with_several_solutions_are_counted() -> None:
    boards = np.array([AMBIGUOUS, [0, *SQUARE[1:]]], dtype=np.int8)
    data = SudokuSet(boards, np.array([SQUARE, SQUARE], dtype=np.int8), 2, 2, np.arange(2))
    assert count_multiple(data) == 1


def test_blank_counts_keep_to_their_support() -> None:
    counts = np.array(blank_counts(39, 50, 44.3, 2.2, 4000, seed=0))
    assert set(range(39, 51)) == set(counts.tolist())
    assert abs(counts.mean() - 44.3) < 0.2
    with pytest.raises(ValueError, match=r"low, high, std: got 5, 4, 1.0"):
        blank_counts(5, 4, 4.0, 1.0, 10)


def test_too_many_blanks_are_refused() -> None:
    with pytest.raises(ValueError, match="no new puzzle with 15 blanks"):
        generate([15], 2, 2)  # no board of 4 x 4 has a unique puzzle of one given


def test_wrong_boards_are_refused() -> None:
    good = np.array([SQUARE], dtype=np.int8)
    puzzle = np.array([AMBIGUOUS], dtype=np.int8)
    with pytest.raises(ValueError, match=r"solutions: boards \[0\] break a rule"):
        SudokuSet(puzzle, good[:, ::-1].copy() * 0 + 1, 2, 2, np.arange(1))
    swapped = good.copy()
    swapped[0, [0, 4]] = swapped[0, [4, 0]]  # rows are wrong, columns and boxes right
    with pytest.raises(ValueError, match="break a rule"):
        SudokuSet(puzzle, swapped, 2, 2, np.arange(1))
    wrong = puzzle.copy()
    wrong[0, 2] = 1
    with pytest.raises(ValueError, match="given that is not the solution's"):
        SudokuSet(wrong, good, 2, 2, np.arange(1))
    with pytest.raises(ValueError, match="have no blank"):
        SudokuSet(good, good, 2, 2, np.arange(1))
    with pytest.raises(ValueError, match=r"puzzles: got shape \(1, 16\)"):
        SudokuSet(puzzle, good, 3, 3, np.arange(1))


def test_units_are_rows_columns_and_boxes() -> None:
    rows, columns, boxes = units(2, 3)
    assert rows[:7].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert columns[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert boxes.view(6, 6)[:3].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]


def test_the_split_is_by_difficulty_and_leaks_nothing(small: SudokuSet) -> None:
    train, test = split_by_difficulty(small, seed=5)
    assert (len(train), len(test)) == (48, 12)
    assert train.blanks.max() <= test.blanks.min()
    assert sorted([*train.ids, *test.ids]) == list(range(60))
    solutions = {board.tobytes() for board in train.solutions}
    assert not solutions & {board.tobytes() for board in test.solutions}
    for part in (train, test):
        np.testing.assert_array_equal(part.puzzles, small.puzzles[part.ids])
    other, _ = split_by_difficulty(small, seed=6)
    assert sorted(other.ids) == sorted(train.ids)
    assert other.ids.tolist() != train.ids.tolist()


def test_a_solution_on_both_sides_is_refused(small: SudokuSet) -> None:
    puzzles, solutions = small.puzzles.copy(), small.solutions.copy()
    puzzles[1], solutions[1] = small.puzzles[0], small.solutions[0]
    twice = SudokuSet(puzzles, solutions, 2, 3, small.ids)
    with pytest.raises(ValueError, match="1 solutions occur more than once"):
        split_by_difficulty(twice)


def test_quotas_are_as_equal_as_capacities_allow() -> None:
    assert equal_quotas([2, 9, 9], 12) == [2, 5, 5]
    assert equal_quotas([5, 5, 5], 7) == [3, 2, 2]
    assert equal_quotas([3, 0, 1], 4) == [3, 0, 1]
    with pytest.raises(ValueError, match="room for 4"):
        equal_quotas([3, 0, 1], 5)


def test_subsets_are_stratified(small: SudokuSet) -> None:
    subset = stratified_subset(small, 20, seed=0)
    assert len(set(subset.ids.tolist())) == 20
    capacities = np.bincount(small.blanks)
    drawn = np.bincount(subset.blanks, minlength=len(capacities))
    assert drawn[drawn < capacities].min() >= drawn.max() - 1  # who is not exhausted is as large as any
    assert len(stratified_subset(small, 1000)) == 60


def satnet_files(folder: Path, puzzles: np.ndarray, solutions: np.ndarray) -> None:
    for name, boards in (("features", puzzles), ("labels", solutions)):
        onehot = torch.eye(10)[torch.from_numpy(boards.astype(np.int64))][..., 1:]
        torch.save(onehot.view(len(boards), 9, 9, 9), folder / f"{name}.pt")


def test_satnet_tensors_are_read(tmp_path: Path) -> None:
    made = generate([40, 45, 50], seed=4)
    satnet_files(tmp_path, made.puzzles, made.solutions)
    for path in (tmp_path, tmp_path / "features.pt"):
        read = load_satnet(path)
        np.testing.assert_array_equal(read.puzzles, made.puzzles)
        np.testing.assert_array_equal(read.solutions, made.solutions)


def test_files_that_are_not_satnets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features\.pt is missing"):
        load_satnet(tmp_path)
    made = generate([40], seed=4)
    satnet_files(tmp_path, made.puzzles, made.solutions)
    torch.save(torch.full((1, 9, 9, 9), 0.5), tmp_path / "labels.pt")
    with pytest.raises(ValueError, match=r"labels\.pt is not one-hot"):
        load_satnet(tmp_path)
    torch.save(torch.zeros(1, 81, 9), tmp_path / "labels.pt")
    with pytest.raises(ValueError, match=r"holds \(1, 81, 9\)"):
        load_satnet(tmp_path)
    torch.save(Path("code"), tmp_path / "labels.pt")  # a pickled object, which loading could run
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        load_satnet(tmp_path)


TINY = SudokuTrainConfig(
    model=SudokuConfig(2, 3, d_model=16, n_heads=2, steps=3),
    updates=6,
    batch_size=20,
    mean_steps=3,
    max_steps=5,
    warmup=2,
    checkpoints=3,
)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_training_ends_the_same(small: SudokuSet, tmp_path: Path, optimizer: str) -> None:
    config = dataclasses.replace(TINY, optimizer=optimizer)
    whole = train_sudoku(config, small, tmp_path / "whole", progress=False)
    assert [p.name for p in whole.checkpoints] == [f"update-{u:07d}.pt" for u in (2, 4, 6)]
    train_sudoku(config, small, tmp_path / "cut", progress=False)
    for update in (4, 6):
        (tmp_path / "cut" / f"update-{update:07d}.pt").unlink()
    resumed = train_sudoku(config, small, tmp_path / "cut", progress=False)
    torch.testing.assert_close(resumed.losses, whole.losses, rtol=0, atol=0)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpoints_carry_their_learning_rate(small: SudokuSet, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, final_learning_rate=1e-5)
    result = train_sudoku(config, small, tmp_path, progress=False)
    assert [load_checkpoint(p).learning_rate for p in result.checkpoints] == pytest.approx(result.learning_rates)
    assert result.learning_rates[0] == config.learning_rate  # the warm-up has just ended
    assert result.learning_rates[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize(("loss_at", "optimizer"), [("last", "adamw"), ("every", "adamw"), ("every", "muon")])
def test_training_lowers_the_loss_with_loop_counts_in_range(
    small: SudokuSet, tmp_path: Path, loss_at: str, optimizer: str
) -> None:
    config = dataclasses.replace(TINY, updates=40, warmup=5, learning_rate=5e-3, loss_at=loss_at, optimizer=optimizer)
    result = train_sudoku(config, small, tmp_path, progress=False)
    assert result.losses[-10:].mean() < result.losses[:5].mean() - 0.05
    assert result.loop_counts.min() >= 1
    assert result.loop_counts.max() == 5


def test_wrong_training_sets_are_refused(small: SudokuSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10 puzzles are less than batch_size=20"):
        train_sudoku(TINY, small.take(range(10)), tmp_path)
    with pytest.raises(ValueError, match="the model's board has others"):
        train_sudoku(dataclasses.replace(TINY, model=SudokuConfig(d_model=16)), small, tmp_path)


class Oracle(SudokuTransformer):
    """Knows every answer, but of board ``b`` one blank only from step ``needed[b]`` on; and no given at all."""

    def __init__(self, config: SudokuConfig, data: SudokuSet, needed: torch.Tensor) -> None:
        super().__init__(config)
        self.needed = needed
        self.answers = torch.from_numpy(data.solutions.astype(np.int64)) - 1
        self.rows = {board.tobytes(): row for row, board in enumerate(data.puzzles.astype(np.int64))}

    def states(self, tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
        rows = torch.tensor([self.rows[board.numpy().tobytes()] for board in tokens])
        for step in range(1, steps + 1):
            said = torch.where(tokens == 0, self.answers[rows], (self.answers[rows] + 1) % self.config.side)
            blank = (tokens == 0).float().argmax(1)
            late = step < self.needed[rows]
            said[late, blank[late]] = (said[late, blank[late]] + 1) % self.config.side
            yield torch.nn.functional.one_hot(said, self.config.side).float()

    def read_out(self, state: torch.Tensor) -> torch.Tensor:
        return state


def test_a_board_is_solved_when_all_its_blanks_are_right(small: SudokuSet) -> None:
    needed = torch.arange(60) % 6 + 1
    model = Oracle(SudokuConfig(2, 3, d_model=8, n_heads=2), small, needed)
    found = solved_by_steps(model, small, [4, 1, 6], batch_size=7)
    np.testing.assert_array_equal(found, needed.numpy()[:, None] <= np.array([4, 1, 6]))
    shares = blanks_right_by_steps(model, small, [4, 1, 6], batch_size=7)
    blanks = (small.puzzles == 0).sum(1)[:, None]
    np.testing.assert_array_equal(shares, np.where(found, 1, (blanks - 1) / blanks))  # the oracle errs in one blank
