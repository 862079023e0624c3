"""What the Sudoku experiment found: numbers beside the paper's, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce.base import Outcome, Result, Run, Section
from reproduce.sudoku import figures
from reproduce.sudoku import statistics as st

if TYPE_CHECKING:
    from reproduce.sudoku.config import Config
    from reproduce.sudoku.measure import Parts


@dataclass(frozen=True)
class Found:
    """What the stages of the experiment computed; keys as :mod:`.measure` returns them.

    Attributes:
        split: training and test set and the subsets of both.
        multiple: puzzles with more than one solution.
        training, accuracy: results of the stages.
        influences: at each checkpoint, without its learning rate.
        influence: summed over checkpoints.
        exact: sketched and exact influence at the last checkpoint.
    """

    split: Parts
    multiple: int
    training: Result
    accuracy: Result
    influences: Sequence[Result]
    influence: Mapping[str, Any]
    exact: Result


@dataclass(frozen=True)
class Analysis:
    """The paper's statistics of one run.

    Attributes:
        table: Table 1.
        difficulty_self, difficulty_mass, self_mass: rank correlations of blanks, self-influence and C.
        broad: puzzles low in self-influence and high in C.
        quarter: size of the bottom quarter.
        energies: of the test puzzles, ``(q, steps)``.
        late_difficulty: rank correlation of a test puzzle's blanks with its late mass.
        late: mean late mass of the test puzzles of each bin.
        late_p: of the easiest against the hardest bin (Welch).
        discrepancy: largest difference between TracIn and the sum of its steps, as a share of the largest TracIn.
        easy, hard: the training groups of Table 1, ``(n,)``.
        test_blanks: difficulty of the test puzzles, ``(q,)``.
    """

    table: st.Table
    difficulty_self: st.Association
    difficulty_mass: st.Association
    self_mass: st.Association
    broad: int
    quarter: int
    energies: st.Array
    late_difficulty: st.Association
    late: dict[st.Bin, float]
    late_p: float
    discrepancy: float
    easy: st.Mask
    hard: st.Mask
    test_blanks: st.Counts


def analyse(config: Config, influence: Mapping[str, Any], train_blanks: st.Counts, test_blanks: st.Counts) -> Analysis:
    """All statistics of D.3 and D.4 from influence ``sdi`` ``(n, q, steps)``, ``tracin`` ``(n, q)``, ``self`` ``(n,)``.

    Raises:
        ValueError: a training group or a test bin without puzzles.
    """
    sdi, tracin, own = influence["sdi"], influence["tracin"], influence["self"]
    easy, hard = train_blanks <= config.easy_at_most, train_blanks >= config.hard_at_least
    outer = (config.bins[0], config.bins[-1])
    mass, energies = st.cross_mass(tracin), st.energy(sdi)
    late = st.late_mass(energies)
    by_bin = [late[st.in_bin(test_blanks, bounds)] for bounds in config.bins]
    return Analysis(
        table=st.table_one(sdi, tracin, own, easy, hard, test_blanks, outer),
        difficulty_self=st.spearman(train_blanks, own),
        difficulty_mass=st.spearman(train_blanks, mass),
        self_mass=st.spearman(own, mass),
        broad=st.memorised_least_but_broad(own, mass),
        quarter=int((own <= np.quantile(own, 0.25)).sum()),
        energies=energies,
        late_difficulty=st.spearman(test_blanks, late),
        late={bounds: float(values.mean()) for bounds, values in zip(config.bins, by_bin, strict=True)},
        late_p=st.welch(by_bin[0], by_bin[-1]),
        discrepancy=float(np.abs(sdi.sum(2) - tracin).max() / np.abs(tracin).max()),
        easy=easy,
        hard=hard,
        test_blanks=test_blanks,
    )


def outcome(run: Run[Config], found: Found) -> Outcome:
    """The report: summary, comparison, sections, figures."""
    from reproduce.sudoku.tables import (
        accuracy_section,
        checkpoint_section,
        comparisons,
        exact_section,
        influence_section,
        set_up_section,
        summary,
        table_section,
    )

    config, split = run.config, found.split
    test_blanks, train_blanks = split.test_sample.blanks, split.train_sample.blanks
    result = analyse(config, found.influence, train_blanks, test_blanks)
    groups = {
        f"train, ≤ {config.easy_at_most} blanks": result.easy,
        f"train, ≥ {config.hard_at_least} blanks": result.hard,
    }
    drawn = {
        "accuracy": figures.accuracy_by_steps(
            config.budgets, found.accuracy["test"], split.test.blanks, config.bins, config.train.mean_steps
        ),
        "energy": figures.energy_curves(result.energies, test_blanks, config.bins),
        "memorisation": figures.memorisation(
            found.influence["self"], st.cross_mass(found.influence["tracin"]), train_blanks
        ),
        "training-groups": figures.by_training_group(found.influence["sdi"], groups, test_blanks, config.bins),
        "training": figures.training(found.training["losses"], found.training["loop_counts"]),
    }
    for name, made in drawn.items():
        run.figure(name, made)
    sections: tuple[Section, ...] = (
        set_up_section(config, found),
        accuracy_section(config, found),
        influence_section(config, result),
        checkpoint_section(config, found),
        table_section(config, result),
        exact_section(config, found),
    )
    return Outcome(
        title=f"Sudoku at the {run.scale} scale (paper: D.3, D.4, Figure 2, Table 1)",
        summary=summary(config, found, result),
        comparisons=comparisons(config, found, result),
        sections=sections,
        numbers=numbers(config, found, result),
    )


def numbers(config: Config, found: Found, result: Analysis) -> dict[str, Any]:
    """Plain values for ``results.json``."""
    test_blanks = found.split.test.blanks
    curves = {figures.label(b): found.accuracy["test"][st.in_bin(test_blanks, b)].mean(0).tolist() for b in config.bins}
    sample_blanks = found.split.test_sample.blanks
    bands = {
        figures.label(b): [v.tolist() for v in st.band(result.energies[st.in_bin(sample_blanks, b)])]
        for b in config.bins
    }
    table = result.table
    return {
        "budgets": list(config.budgets),
        "test_board_accuracy": {**curves, "all": found.accuracy["test"].mean(0).tolist()},
        "train_board_accuracy": found.accuracy["train"].mean(0).tolist(),
        "energy_low_median_high": bands,
        "self_influence": [asdict(q) for q in table.self_influence],
        "cross_mass": [asdict(q) for q in table.mass],
        "p_self": table.self_p,
        "p_mass": table.mass_p,
        "share": {figures.label(b): asdict(c) for b, c in table.share.items()},
        "late_mass_by_training_group": {figures.label(b): asdict(c) for b, c in table.late.items()},
        "late_mass": {figures.label(b): v for b, v in result.late.items()},
        "late_mass_p": result.late_p,
        "late_mass_by_checkpoint": [
            [float(late[st.in_bin(sample_blanks, b)].mean()) for b in config.bins]
            for late in (st.late_mass(st.energy(part["sdi"].astype(np.float64))) for part in found.influences)
        ],
        "spearman": {
            "blanks, self-influence": asdict(result.difficulty_self),
            "blanks, C": asdict(result.difficulty_mass),
            "self-influence, C": asdict(result.self_mass),
            "test blanks, late mass": asdict(result.late_difficulty),
        },
        "bottom_quarter_self_and_top_quarter_C": result.broad,
        "conservation_relative_discrepancy": result.discrepancy,
        "training_group_sizes": [int(result.easy.sum()), int(result.hard.sum()), len(result.easy)],
        "checkpoint_learning_rates": list(found.training["learning_rates"]),
        "puzzles_with_more_than_one_solution": found.multiple,
    }
