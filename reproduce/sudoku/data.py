"""Sudoku puzzles (paper D.3): checked sets of boards, SATNet's tensors, the split by difficulty, subsets, accuracy."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from stepinfluence.arguments import non_negative_int, positive_int
from torch import Tensor

from reproduce.sudoku.model import SudokuTransformer, units

Boards = npt.NDArray[np.int8]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SudokuSet:
    """Puzzles with their solutions.

    Attributes:
        puzzles: int8 ``(N, cells)`` row by row: 0 for a blank cell, else the value from 1.
        solutions: int8 ``(N, cells)``: values 1 .. side.
        box_rows, box_columns: shape of a box; side = box_rows * box_columns, cells = side ** 2.
        ids: int64 ``(N,)``: number of each puzzle in the set that it came from.

    Raises:
        ValueError: wrong shapes, a solution that breaks a rule, a given that is not the solution's, or a puzzle
            without blanks. That solutions are unique is not checked here: see ``count_multiple``.
    """

    puzzles: Boards
    solutions: Boards
    box_rows: int
    box_columns: int
    ids: Counts

    def __post_init__(self) -> None:
        side = positive_int("box_rows", self.box_rows) * positive_int("box_columns", self.box_columns)
        for name, boards in (("puzzles", self.puzzles), ("solutions", self.solutions)):
            if boards.ndim != 2 or boards.shape[1] != side**2 or len(boards) != len(self.ids):
                raise ValueError(f"{name}: got shape {boards.shape}; pass ({len(self.ids)}, {side**2})")
        rules = [group.numpy() for group in units(self.box_rows, self.box_columns)]
        for group in rules:
            # Every value once in every unit: boards regrouped by unit, (N, units, cells of a unit).
            order = np.argsort(group, kind="stable")
            by_unit = self.solutions[:, order].reshape(len(self.solutions), side, side)
            valid = (np.sort(by_unit, axis=2) == np.arange(1, side + 1)).all(axis=(1, 2))
            _require("solutions", valid, "break a rule of the game")
        given = self.puzzles != 0
        _require(
            "puzzles", (~given | (self.puzzles == self.solutions)).all(1), "have a given that is not the solution's"
        )
        _require("puzzles", ~given.all(1), "have no blank")

    @property
    def blanks(self) -> Counts:
        """Difficulty (paper D.3): number of blank cells of each puzzle, int64 ``(N,)``."""
        counts: Counts = (self.puzzles == 0).sum(1, dtype=np.int64)
        return counts

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | Counts) -> SudokuSet:
        """The puzzles in these rows, in this order, with their ids."""
        at = np.asarray(rows, dtype=np.int64)
        return SudokuSet(self.puzzles[at], self.solutions[at], self.box_rows, self.box_columns, self.ids[at])

    def batches(self, size: int, device: torch.device | str = "cpu") -> list[dict[str, Tensor]]:
        """Batches in order: ``tokens`` and ``solution`` int64 ``(B, cells)`` and ``ids`` int64 ``(B,)``."""
        size = positive_int("size", size)
        cuts = range(0, len(self), size)
        return [
            {
                "tokens": torch.from_numpy(self.puzzles[c : c + size].astype(np.int64)).to(device),
                "solution": torch.from_numpy(self.solutions[c : c + size].astype(np.int64)).to(device),
                "ids": torch.from_numpy(self.ids[c : c + size]),
            }
            for c in cuts
        ]


def _require(name: str, good: npt.NDArray[np.bool_], what: str) -> None:
    if not good.all():
        bad = np.flatnonzero(~good)
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{name}: boards {bad[:5].tolist()}{more} {what}; leave them out")


def load_satnet(path: str | Path) -> SudokuSet:
    """SATNet's Sudoku tensors (Wang et al., 2019), each ``(10000, 9, 9, 9)``, one-hot in the last dimension.

    Args:
        path: the folder with ``features.pt`` (blank cells are all zeros) and ``labels.pt``, or either file.

    Returns:
        The puzzles, with their place in the file as ids.

    Raises:
        ValueError: a file is missing, damaged, holds anything but a tensor, or tensors of another kind; or as for
            :class:`SudokuSet`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    boards = []
    for name in ("features.pt", "labels.pt"):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"data: {file} is missing; pass the folder of SATNet's features.pt and labels.pt")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"data: {file} is not a file of plain tensors; get SATNet's {name} again") from error
        if not isinstance(content, Tensor) or content.dim() != 4 or content.shape[1:] != (9, 9, 9):
            got = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
            raise ValueError(f"data: {file} holds {got}; SATNet's {name} is a tensor of shape (10000, 9, 9, 9)")
        onehot = content.numpy().reshape(len(content), 81, 9)
        filled = onehot.sum(2)
        if not (np.isin(onehot, (0, 1)).all() and (filled <= 1).all()):
            raise ValueError(f"data: {file} is not one-hot in its last dimension; get SATNet's {name} again")
        boards.append(np.where(filled > 0, onehot.argmax(2) + 1, 0).astype(np.int8))
    if len(boards[0]) != len(boards[1]):
        raise ValueError(f"data: {len(boards[0])} puzzles but {len(boards[1])} solutions; use files of one download")
    return SudokuSet(boards[0], boards[1], 3, 3, np.arange(len(boards[0])))


def split_by_difficulty(data: SudokuSet, *, train_share: float = 0.8, seed: int = 0) -> tuple[SudokuSet, SudokuSet]:
    """The easiest puzzles to train on and the hardest to test on, each shuffled (paper D.3).

    Puzzles of the same number of blanks keep their order, so the one count at which the cut falls may be in both.

    Args:
        data: puzzles; no two with the same solution.
        train_share: share of the puzzles that are trained on.
        seed: of the shuffles.

    Returns:
        Training and test set.

    Raises:
        ValueError: a solution occurs twice, so that the model could have seen a test board's; or an empty side.
    """
    repeated = len(data) - len(np.unique(data.solutions, axis=0))
    if repeated:
        raise ValueError(f"data: {repeated} solutions occur more than once; leave the copies out")
    if not 0 < train_share < 1:
        raise ValueError(f"train_share: got {train_share}; pass a share between 0 and 1")
    cut = round(train_share * len(data))
    if not 0 < cut < len(data):
        raise ValueError(f"data: {len(data)} puzzles are too few to split at {train_share}")
    order = np.argsort(data.blanks, kind="stable")
    # Both shuffles are by the same seed, as in the paper.
    easy, hard = (
        np.random.default_rng(non_negative_int("seed", seed)).permutation(p) for p in (order[:cut], order[cut:])
    )
    return data.take(easy), data.take(hard)


def stratified_subset(data: SudokuSet, size: int, *, seed: int = 0) -> SudokuSet:
    """A subset with as equal numbers of puzzles of each blank count as the counts' capacities allow (paper D.4).

    Args:
        data: puzzles.
        size: puzzles to draw; all of them if there are no more.
        seed: of the draw.

    Returns:
        Distinct puzzles by increasing number of blanks, with the ids they had.
    """
    blanks = data.blanks
    strata = [np.flatnonzero(blanks == count) for count in np.unique(blanks)]
    quotas = equal_quotas([len(s) for s in strata], min(positive_int("size", size), len(data)))
    generator = np.random.default_rng(non_negative_int("seed", seed))
    rows = [np.sort(generator.permutation(s)[:quota]) for s, quota in zip(strata, quotas, strict=True)]
    return data.take(np.concatenate(rows))


def equal_quotas(capacities: Sequence[int], total: int) -> list[int]:
    """``total`` dealt out one by one in turn to those that are not full: ``equal_quotas([2, 9, 9], 12) == [2, 5, 5]``.

    Raises:
        ValueError: more than there is room for.
    """
    if total > sum(capacities):
        raise ValueError(f"total: got {total}, there is room for {sum(capacities)}; pass less")
    quotas = [0] * len(capacities)
    left = total
    while left:
        for k in [k for k, capacity in enumerate(capacities) if quotas[k] < capacity][:left]:
            quotas[k] += 1
            left -= 1
    return quotas


@torch.no_grad()
def blanks_right_by_steps(
    model: SudokuTransformer, data: SudokuSet, budgets: Sequence[int], *, batch_size: int = 256
) -> npt.NDArray[np.float64]:
    """Share of each board's blank cells that is right after which number of loop steps.

    One pass serves all budgets: a state does not depend on the steps that follow it, so reading it out is the same as
    running the model with that budget.

    Args:
        model: the model, on any device.
        data: puzzles.
        budgets: numbers of loop steps.
        batch_size: boards per pass.

    Returns:
        float64 ``(N, len(budgets))``.

    Raises:
        ValueError: no budget, or one that is not positive.
    """
    wanted = {positive_int("budgets", int(b)) for b in budgets}
    if not wanted:
        raise ValueError("budgets: got none; pass numbers of loop steps")
    device = next(model.parameters()).device
    return np.concatenate(
        [
            np.stack([right[b] for b in budgets], axis=1)
            for batch in data.batches(batch_size, device)
            for right in [dict(_blanks_right(model, batch, wanted))]
        ]
    )


def solved_by_steps(
    model: SudokuTransformer, data: SudokuSet, budgets: Sequence[int], *, batch_size: int = 256
) -> npt.NDArray[np.bool_]:
    """Which boards are solved, all blanks right, after which number of loop steps (paper D.3): bool ``(N, budgets)``.

    Arguments and errors are those of :func:`blanks_right_by_steps`.
    """
    solved: npt.NDArray[np.bool_] = blanks_right_by_steps(model, data, budgets, batch_size=batch_size) == 1
    return solved


def _blanks_right(
    model: SudokuTransformer, batch: dict[str, Tensor], wanted: set[int]
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    blank = batch["tokens"] == 0
    for step, state in enumerate(model.states(batch["tokens"], max(wanted)), start=1):
        if step in wanted:
            right = (model.read_out(state).argmax(-1) + 1 == batch["solution"]) & blank
            yield step, (right.sum(1).double() / blank.sum(1)).cpu().numpy()
