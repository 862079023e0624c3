"""The paper's numbers of its Sudoku part beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reproduce.base import Comparison
from reproduce.sudoku import statistics as st

if TYPE_CHECKING:
    from reproduce.sudoku.analyse import Analysis, Found
    from reproduce.sudoku.config import Config

SCALE_NOTE = "the unit is set by learning rates and checkpoints, which the paper does not give: compare the ratio"


def p_value(p: float) -> str:
    """``p < 0.001`` or ``p = 0.012``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent(share: float) -> str:
    """``12.3%``."""
    return f"{100 * share:.1f}%"


def saturation(config: Config, found: Found, bounds: st.Bin) -> int:
    """Smallest budget whose accuracy on a bin is within one point of the bin's best."""
    share = found.accuracy["test"][st.in_bin(found.split.test.blanks, bounds)].mean(0)
    return int(config.budgets[int((share >= share.max() - 0.01).argmax())])


def comparisons(config: Config, found: Found, result: Analysis) -> tuple[Comparison, ...]:
    """Every number of the paper's Sudoku part beside ours."""
    table = result.table
    (self_easy, self_hard), (mass_easy, mass_hard) = table.self_influence, table.mass
    first, last = config.bins[0], config.bins[-1]
    mean = config.train.mean_steps

    def rank(what: str, found: st.Association, paper: float) -> Comparison:
        return Comparison(f"Spearman: {what}", f"{found.rho:.3f} ({p_value(found.p)})", f"{paper} (p < 0.001)", "§4")

    def contrast(what: str, c: st.Contrast, paper: str) -> Comparison:
        return Comparison(what, f"{percent(c.easy)} / {percent(c.hard)} ({p_value(c.p)})", paper, "Table 1")

    return (
        rank("blanks, self-influence", result.difficulty_self, 0.428),
        rank("blanks, cross-influence mass C", result.difficulty_mass, 0.500),
        rank("self-influence, C", result.self_mass, 0.919),
        Comparison(
            "bottom quarter of self-influence in the top quarter of C",
            f"{result.broad} of {result.quarter}", "0", "§4",
        ),
        Comparison("self-influence, easy train", str(self_easy), "0.225 [0.155, 0.367]", "Table 1", SCALE_NOTE),
        Comparison("self-influence, hard train", str(self_hard), "0.451 [0.303, 0.787]", "Table 1", SCALE_NOTE),
        Comparison(
            "self-influence, hard / easy median",
            f"{self_hard.median / self_easy.median:.2f} ({p_value(table.self_p)})", "2.00 (p < 0.001)", "Table 1",
        ),
        Comparison("C, easy train", str(mass_easy), "3.07 [2.60, 3.82]", "Table 1", SCALE_NOTE),
        Comparison("C, hard train", str(mass_hard), "4.43 [3.77, 5.80]", "Table 1", SCALE_NOTE),
        Comparison(
            "C, hard / easy median",
            f"{mass_hard.median / mass_easy.median:.2f} ({p_value(table.mass_p)})", "1.44 (p < 0.001)", "Table 1",
        ),
        contrast("share of mass, easy / hard train, on easy test", table.share[first], "28.9% / 37.7% (p < 0.001)"),
        contrast("share of mass, easy / hard train, on hard test", table.share[last], "27.9% / 38.9% (p < 0.001)"),
        contrast("SDI late mass, easy / hard train, on easy test", table.late[first], "24.0% / 24.9% (p < 0.001)"),
        contrast("SDI late mass, easy / hard train, on hard test", table.late[last], "24.3% / 25.3% (p < 0.001)"),
        Comparison(
            "late mass of all training puzzles, easy / hard test",
            f"{percent(result.late[first])} / {percent(result.late[last])} ({p_value(result.late_p)})",
            "hard decays more slowly", "Fig. 2B",
        ),
        Comparison(
            "loop steps at which accuracy on the hardest test puzzles saturates, over the training mean",
            f"{saturation(config, found, last) / mean:.2f}", "1 (caption) to 2 (text)", "Fig. 2A",
            "within one point of the best of the budgets tried",
        ),
        Comparison(
            "conservation: largest |TracIn − Σ SDI| over largest |TracIn|",
            f"{result.discrepancy:.1e}", "checked, no number", "D.4",
        ),
    )  # fmt: skip
