"""Sudoku puzzles with exactly one solution, generated and checked with the SAT solvers of PySAT (``python-sat``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from stepinfluence.arguments import non_negative_int, positive_int

from reproduce.sudoku.data import Boards, SudokuSet
from reproduce.sudoku.model import units

if TYPE_CHECKING:
    from numpy.random import Generator


class Rules:
    """The rules of a board as a SAT problem, asked again and again under different assumptions.

    Args:
        box_rows, box_columns: shape of a box.

    Raises:
        ImportError: PySAT is not installed.
    """

    def __init__(self, box_rows: int = 3, box_columns: int = 3) -> None:
        try:
            from pysat.solvers import Glucose4
        except ImportError as error:
            raise ImportError("python-sat: not installed; run pip install 'sdi-kernels[sudoku]'") from error
        self.side = positive_int("box_rows", box_rows) * positive_int("box_columns", box_columns)
        self.cells = self.side**2
        self._solver = Glucose4(bootstrap_with=list(self._clauses(box_rows, box_columns)))
        self._spare = self.cells * self.side

    def __enter__(self) -> Rules:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._solver.delete()

    def possible(self, board: Sequence[int], *, unlike: tuple[int, int] | None = None) -> bool:
        """Whether ``board`` (0 for blanks) can be completed; with ``unlike`` to one without this (cell, value)."""
        barred = [] if unlike is None else [-self._literal(*unlike)]
        return bool(self._solver.solve(assumptions=self._givens(board) + barred))

    def count(self, board: Sequence[int], limit: int = 2) -> int:
        """Number of ways to complete ``board`` (0 for blanks), counted up to ``limit``."""
        # A clause that counts only while its own literal is assumed: the solver is used again.
        self._spare += 1
        active, found = self._spare, 0
        while found < limit and self._solver.solve(assumptions=[*self._givens(board), active]):
            found += 1
            model = [literal for literal in self._solver.get_model()[: self.cells * self.side] if literal > 0]
            self._solver.add_clause([-active, *(-literal for literal in model)])
        self._solver.add_clause([-active])
        return found

    def _literal(self, cell: int, value: int) -> int:
        return cell * self.side + value

    def _givens(self, board: Sequence[int]) -> list[int]:
        return [self._literal(cell, int(value)) for cell, value in enumerate(board) if value]

    def _clauses(self, box_rows: int, box_columns: int) -> Iterator[list[int]]:
        values, cells = range(1, self.side + 1), range(self.cells)
        groups = [[self._literal(cell, value) for value in values] for cell in cells]
        for membership in units(box_rows, box_columns):
            for unit in range(self.side):
                inside = (membership == unit).nonzero().flatten().tolist()
                groups += [[self._literal(cell, value) for cell in inside] for value in values]
        for group in groups:  # exactly one of each
            yield group
            yield from ([-a, -b] for a, b in itertools.combinations(group, 2))


def count_multiple(data: SudokuSet) -> int:
    """Number of puzzles with more than one solution.

    Raises:
        ImportError: PySAT is not installed.
    """
    with Rules(data.box_rows, data.box_columns) as rules:
        return sum(rules.count(puzzle.tolist()) > 1 for puzzle in data.puzzles)


def blank_counts(low: int, high: int, mean: float, std: float, count: int, *, seed: int = 0) -> list[int]:
    """Numbers of blanks for ``count`` puzzles: a normal distribution at the whole numbers ``low .. high``.

    Args:
        low, high: smallest and largest number.
        mean, std: of the normal distribution, before it is cut off.
        count: how many numbers.
        seed: of the draw.

    Raises:
        ValueError: ``low`` above ``high``, or a ``std`` that is not positive.
    """
    if not 1 <= low <= high or std <= 0:
        raise ValueError(f"low, high, std: got {low}, {high}, {std}; pass 1 <= low <= high and std > 0")
    support = np.arange(low, high + 1)
    weights = np.exp(-(((support - mean) / std) ** 2) / 2)
    return [int(n) for n in np.random.default_rng((seed, 1)).choice(support, size=count, p=weights / weights.sum())]


def generate(blanks: Sequence[int], box_rows: int = 3, box_columns: int = 3, *, seed: int = 0) -> SudokuSet:
    """Random puzzles with exactly one solution each, all solutions different.

    A board is filled cell by cell in random order with random values that leave it solvable; then cells are blanked
    in random order wherever the solution stays the only one.

    Args:
        blanks: number of blank cells of each puzzle.
        box_rows, box_columns: shape of a box.
        seed: the same seed gives the same puzzles on every machine.

    Returns:
        The puzzles, with ids 0, 1, ...

    Raises:
        ImportError: PySAT is not installed.
        ValueError: a number of blanks that was not reached from 50 boards.
    """
    generator = np.random.default_rng((non_negative_int("seed", seed), 2))
    puzzles: list[Boards] = []
    solutions: dict[bytes, Boards] = {}
    with Rules(box_rows, box_columns) as rules:
        for wanted in blanks:
            for _ in range(50):
                solution = _fill(rules, generator)
                puzzle = _blank_out(rules, solution, wanted, generator)
                if puzzle is not None and solution.tobytes() not in solutions:
                    break
            else:
                raise ValueError(f"blanks: no new puzzle with {wanted} blanks found from 50 boards; pass fewer blanks")
            puzzles.append(puzzle)
            solutions[solution.tobytes()] = solution
    return SudokuSet(np.stack(puzzles), np.stack([*solutions.values()]), box_rows, box_columns, np.arange(len(puzzles)))


def _fill(rules: Rules, generator: Generator) -> Boards:
    board = np.zeros(rules.cells, dtype=np.int8)
    for cell in generator.permutation(rules.cells):
        for value in generator.permutation(rules.side) + 1:
            board[cell] = value
            if rules.possible(board.tolist()):
                break
    return board


def _blank_out(rules: Rules, solution: Boards, wanted: int, generator: Generator) -> Boards | None:
    puzzle = solution.copy()
    for cell in generator.permutation(rules.cells):
        if (puzzle == 0).sum() == wanted:
            return puzzle
        puzzle[cell] = 0
        # Before, the solution was the only one: another one would have to differ in this cell.
        if rules.possible(puzzle.tolist(), unlike=(int(cell), int(solution[cell]))):
            puzzle[cell] = solution[cell]
    return puzzle if (puzzle == 0).sum() == wanted else None
