"""What the Sudoku experiment found: the paper's statistics, and our numbers beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce.base import Outcome, Result, Run
from reproduce.sudoku import figures
from reproduce.sudoku import statistics as st
from reproduce.sudoku.compare import comparisons, p_value, percent
from reproduce.sudoku.config import CONFIGS
from reproduce.sudoku.figures import label
from reproduce.template import fill

if TYPE_CHECKING:
    from reproduce.sudoku.config import Config
    from reproduce.sudoku.measure import Parts


@dataclass(frozen=True)
class Evaluation:
    """Influence between one choice of training and test puzzles, by one choice of hashes; keys as in :mod:`.measure`.

    Attributes:
        split: training and test set and the subsets of both.
        rates: learning rates of the checkpoints.
        parts: influence at each checkpoint, without its learning rate.
        total: summed over checkpoints.
    """

    split: Parts
    rates: Sequence[float]
    parts: Sequence[Result]
    total: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What the stages of the experiment computed; keys as :mod:`.measure` returns them.

    Attributes:
        multiple: puzzles with more than one solution.
        training, accuracy, blanks_right: results of the stages.
        evaluations: of the same model, each on puzzles of its own; the report is of the first.
        exact: sketched and exact influence at the last checkpoint.
    """

    multiple: int
    training: Result
    accuracy: Result
    blanks_right: Result
    evaluations: Sequence[Evaluation]
    exact: Result

    @property
    def split(self) -> Parts:
        """Of the first evaluation; training and test set are the same in all."""
        return self.evaluations[0].split


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


def analyse(config: Config, found: Evaluation) -> Analysis:
    """All statistics of D.3 and D.4 from influence ``sdi`` ``(n, q, steps)``, ``tracin`` ``(n, q)``, ``self`` ``(n,)``.

    Raises:
        ValueError: a training group or a test bin without puzzles.
    """
    influence = found.total
    train_blanks, test_blanks = found.split.train_sample.blanks, found.split.test_sample.blanks
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


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint adds.

    Attributes:
        update, rate: when it was made, and its learning rate.
        mass: its share of learning rate times summed absolute TracIn, before checkpoints are added up.
        easy, hard: late mass on the easiest and the hardest test bin, at this checkpoint alone.
        p: of their difference (Welch).
    """

    update: int
    rate: float
    mass: float
    easy: float
    hard: float
    p: float


def checkpoints(config: Config, found: Found) -> list[Checkpoint]:
    """Each checkpoint's share of the mass, and when influence acts there."""
    first, updates = found.evaluations[0], config.influence_updates
    blanks, rates = first.split.test_sample.blanks, first.rates
    mass = np.array([r * np.abs(part["tracin"]).sum() for r, part in zip(rates, first.parts, strict=True)])
    result = []
    for update, rate, share, part in zip(updates, rates, mass / mass.sum(), first.parts, strict=True):
        late = st.late_mass(st.energy(part["sdi"].astype(np.float64)))
        easy, hard = (late[st.in_bin(blanks, bounds)] for bounds in (config.bins[0], config.bins[-1]))
        result.append(
            Checkpoint(update, rate, float(share), float(easy.mean()), float(hard.mean()), st.welch(easy, hard))
        )
    return result


def accuracies(config: Config, found: Found) -> list[dict[str, Any]]:
    """Share of boards solved with each budget of loop steps: of each test bin, all test puzzles, training puzzles; and
    of the test puzzles' blanks."""
    blanks, solved = found.split.test.blanks, found.accuracy["test"]
    overall, train = solved.mean(0), found.accuracy["train"]
    return [
        {
            "budget": budget,
            "by_bin": [solved[st.in_bin(blanks, b), k].mean() for b in config.bins],
            "all": overall[k],
            "train": train[:, k].mean(),
            "blanks": found.blanks_right["test"][:, k].mean(),
        }
        for k, budget in enumerate(config.budgets)
    ]


def over_evaluations(config: Config, results: Sequence[Analysis]) -> dict[str, list[float]]:
    """The main figures of each evaluation: how much of them is the choice of puzzles and hashes."""
    first, last = config.bins[0], config.bins[-1]
    return {
        "Spearman: blanks, self-influence": [one.difficulty_self.rho for one in results],
        "Spearman: blanks, C": [one.difficulty_mass.rho for one in results],
        "Spearman: self-influence, C": [one.self_mass.rho for one in results],
        "self-influence, hard / easy median": [
            one.table.self_influence[1].median / one.table.self_influence[0].median for one in results
        ],
        "C, hard / easy median": [one.table.mass[1].median / one.table.mass[0].median for one in results],
        "late mass, easiest test puzzles": [one.late[first] for one in results],
        "late mass, hardest test puzzles": [one.late[last] for one in results],
    }


def core_hours(config: Config, cpu_seconds: float) -> float | None:
    """Of the paper's training, at the rate of this one for a board and loop step (None: at another width)."""
    paper = CONFIGS["paper"].train
    if (config.train.model.d_model, config.train.model.cells) != (paper.model.d_model, paper.model.cells):
        return None
    work, whole = (int(train.loop_counts().sum()) * train.batch_size for train in (config.train, paper))
    return cpu_seconds / work * whole / 3600


def energy_rows(config: Config, result: Analysis) -> list[dict[str, Any]]:
    """When influence acts, for each test bin."""
    parts = {bounds: result.energies[st.in_bin(result.test_blanks, bounds)] for bounds in config.bins}
    return [
        {
            "bounds": bounds,
            "centre": st.centre_of_mass(curves).mean(),
            "half": np.median(st.crossing_step(curves)),
        }
        for bounds, curves in parts.items()
    ]


def against_exact(found: Found) -> dict[str, Any]:
    """How much of all this is noise of the sketches: the same statistics from exact gradients."""
    data = found.exact
    blanks, rows = data["train_blanks"], []
    for name in ("exact", "sketched"):
        sdi, tracin, own = (data[f"{name}_{key}"].astype(np.float64) for key in ("sdi", "tracin", "self"))
        mass = st.cross_mass(tracin)
        rows.append(
            {
                "gradients": name,
                "blanks_self": st.spearman(blanks, own).rho,
                "blanks_mass": st.spearman(blanks, mass).rho,
                "self_mass": st.spearman(own, mass).rho,
                "late": st.late_mass(st.energy(sdi)).mean(),
            }
        )
    errors = {
        key: float(
            np.linalg.norm(data[f"sketched_{key}"] - data[f"exact_{key}"]) / np.linalg.norm(data[f"exact_{key}"])
        )
        for key in ("sdi", "tracin")
    }
    train, test = data["exact_sdi"].shape[:2]
    return {"rows": rows, "errors": errors, "train": train, "test": test}


def outcome(run: Run[Config], found: Found) -> Outcome:
    """The report: summary, comparison, text, figures."""
    config, split = run.config, found.split
    results = [analyse(config, evaluation) for evaluation in found.evaluations]
    result = results[0]
    draw(run, found, result)
    each, accuracy = checkpoints(config, found), accuracies(config, found)
    text = fill(
        "sudoku",
        {
            "config": config,
            "split": split,
            "training": found.training,
            "multiple": found.multiple,
            "result": result,
            "accuracy": accuracy,
            "best": max(accuracy, key=lambda row: row["all"]),
            "best_blanks": max(accuracy, key=lambda row: row["blanks"]),
            "train_boards": len(found.accuracy["train"]),
            "energies": energy_rows(config, result),
            "checkpoints": each,
            "more_on_hardest": sum(one.hard > one.easy for one in each),
            "exact": against_exact(found),
            "over": over_evaluations(config, results),
            "paper_updates": CONFIGS["paper"].train.updates,
            "core_hours": core_hours(config, run.timings["training"]["cpu_seconds"]),
        },
        {"percent": percent, "p_value": p_value, "label": label, "loop_steps": _loop_steps, "span": _span},
    )
    return Outcome(
        title=f"Sudoku at the {run.scale} scale (paper: D.3, D.4, Figure 2, Table 1)",
        summary=text.summary,
        body=text.body,
        comparisons=comparisons(config, found, result),
        numbers={**numbers(config, found, result), "over_evaluations": over_evaluations(config, results)},
    )


def draw(run: Run[Config], found: Found, result: Analysis) -> None:
    """Save the figures that the report shows."""
    config, split, total = run.config, found.split, found.evaluations[0].total
    groups = {
        f"train, ≤ {config.easy_at_most} blanks": result.easy,
        f"train, ≥ {config.hard_at_least} blanks": result.hard,
    }
    train_blanks, test_blanks = split.train_sample.blanks, split.test_sample.blanks
    drawn = {
        "accuracy": figures.accuracy_by_steps(
            config.budgets, found.accuracy["test"], split.test.blanks, config.bins, config.train.mean_steps
        ),
        "energy": figures.energy_curves(result.energies, test_blanks, config.bins),
        "memorisation": figures.memorisation(total["self"], st.cross_mass(total["tracin"]), train_blanks),
        "training-groups": figures.by_training_group(
            found.evaluations[0].total["sdi"], groups, test_blanks, config.bins
        ),
        "training": figures.training(found.training["losses"], found.training["loop_counts"]),
    }
    for name, made in drawn.items():
        run.figure(name, made)


def _loop_steps(count: int) -> str:
    return "1 loop step" if count == 1 else f"{count} loop steps"


def _span(blanks: st.Counts) -> str:
    return f"{len(blanks):,} puzzles with {blanks.min()} to {blanks.max()} blanks"


def numbers(config: Config, found: Found, result: Analysis) -> dict[str, Any]:
    """Plain values for ``results.json``."""
    test_blanks = found.split.test.blanks
    curves = {label(b): found.accuracy["test"][st.in_bin(test_blanks, b)].mean(0).tolist() for b in config.bins}
    sample_blanks = found.split.test_sample.blanks
    bands = {label(b): [v.tolist() for v in st.band(result.energies[st.in_bin(sample_blanks, b)])] for b in config.bins}
    table = result.table
    return {
        "budgets": list(config.budgets),
        "test_board_accuracy": {**curves, "all": found.accuracy["test"].mean(0).tolist()},
        "test_blanks_right": found.blanks_right["test"].mean(0).tolist(),
        "train_board_accuracy": found.accuracy["train"].mean(0).tolist(),
        "energy_low_median_high": bands,
        "self_influence": [asdict(q) for q in table.self_influence],
        "cross_mass": [asdict(q) for q in table.mass],
        "p_self": table.self_p,
        "p_mass": table.mass_p,
        "share": {label(b): asdict(c) for b, c in table.share.items()},
        "late_mass_by_training_group": {label(b): asdict(c) for b, c in table.late.items()},
        "late_mass": {label(b): v for b, v in result.late.items()},
        "late_mass_p": result.late_p,
        "late_mass_by_checkpoint": [
            [float(late[st.in_bin(sample_blanks, b)].mean()) for b in config.bins]
            for late in (st.late_mass(st.energy(part["sdi"].astype(np.float64))) for part in found.evaluations[0].parts)
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
        "checkpoint_learning_rates": [one.rate for one in checkpoints(config, found)],
        "puzzles_with_more_than_one_solution": found.multiple,
    }
