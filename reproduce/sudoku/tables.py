"""Text of the Sudoku report: summary, comparison with the paper, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reproduce.base import Comparison, Section
from reproduce.sudoku import statistics as st
from reproduce.sudoku.figures import label

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


def summary(config: Config, found: Found, result: Analysis) -> str:
    """Two to five sentences with the measured numbers."""
    model, accuracy = config.train.model, found.accuracy["test"]
    best = int(accuracy.mean(0).argmax())
    easy, hard = result.table.self_influence
    late_easy, late_hard = result.late[config.bins[0]], result.late[config.bins[-1]]
    alone = sum(b > a for _, a, b in checkpoint_late_mass(config, found))
    return (
        f"A looped transformer (one block of width {model.d_model}, {config.train.mean_steps:g} loop steps on average) "
        f"was trained on the {len(found.split.train):,} easier of {model.side} × {model.side} Sudoku puzzles. "
        f"On the {len(found.split.test):,} harder ones it solves {percent(accuracy.mean(0)[0])} of the boards with "
        f"{_steps(config.budgets[0])} and {percent(accuracy.mean(0)[best])} with {_steps(config.budgets[best])}.\n\n"
        f"Harder training puzzles have {hard.median / easy.median:.2f} times the median self-influence of easy ones "
        f"(paper: 2.00). Self-influence and cross-influence mass have a rank correlation of {result.self_mass.rho:.2f} "
        f"(paper: 0.92). The later half of the loop steps holds {percent(late_easy)} of the SDI energy of the easiest "
        f"test puzzles and {percent(late_hard)} of that of the hardest ({p_value(result.late_p)}); "
        f"taken alone, {alone} of {len(found.influences)} checkpoints have more on the hardest."
        + (
            ""
            if model.side == 9 and config.data is not None
            else "\n\nThese are not the paper's puzzles"
            + ("" if model.side == 9 else " nor its board")
            + ": compare directions and ratios, not absolute values."
        )
    )


def _steps(count: int) -> str:
    return "1 loop step" if count == 1 else f"{count} loop steps"


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


def set_up_section(config: Config, found: Found) -> Section:
    """Puzzles, split, model, training."""
    split, train, model = found.split, config.train, config.train.model
    source = "SATNet's tensors" if config.data else "generated"
    unique = (
        "each with exactly one solution (checked)"
        if not found.multiple
        else f"{found.multiple} of which have more than one solution"
    )
    embeddings = {"cell": "each cell", "row_column_box": "row, column and box"}[model.positions]
    rows = [
        ("puzzles", f"{len(split.train) + len(split.test):,} of {model.side} × {model.side} cells, {source}, {unique}"),
        ("split", f"{_span(split.train.blanks)} to train, {_span(split.test.blanks)} to test"),
        (
            "model",
            (
                f"{found.training['parameters']:,} parameters, {found.training['body_parameters']:,} of them in the "
                f"loop body: one block, width {model.d_model}, {model.n_heads} heads, learned embeddings of "
                f"{embeddings}"
            ),
        ),
        (
            "loop steps in training",
            (
                f"Poisson-log-normal, mean {train.mean_steps:g}, clipped at {train.max_steps} "
                f"(drawn: mean {found.training['loop_counts'].mean():.1f}); loss after the {_loss_at(train.loss_at)}"
            ),
        ),
        (
            "training",
            (
                f"{train.updates:,} updates of {train.batch_size} boards "
                f"({train.updates * train.batch_size / len(split.train):.0f} epochs), AdamW, learning rate "
                f"{train.learning_rate:g} to {train.final_learning_rate:g}"
            ),
        ),
        (
            "influence",
            (
                f"{len(split.train_sample)} training and {len(split.test_sample)} test puzzles, {model.steps} loop "
                f"steps, sketch size {config.sketch_size} per parameter, {len(found.training['checkpoints'])} "
                "checkpoints, each weighted by its learning rate"
            ),
        ),
    ]
    text = "| | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows)
    return Section("Set-up", text, ("training",))


def _loss_at(at: str) -> str:
    return "last step" if at == "last" else "steps, mean over all of them"


def _span(blanks: st.Counts) -> str:
    return f"{len(blanks):,} puzzles with {blanks.min()} to {blanks.max()} blanks"


def accuracy_section(config: Config, found: Found) -> Section:
    """Board accuracy by test-time loop steps and difficulty (Fig. 2A)."""
    blanks, solved = found.split.test.blanks, found.accuracy["test"]
    head = "| loop steps | " + " | ".join(label(b) for b in config.bins) + " | test, all | training puzzles |"
    lines = [head, "|---" * (len(config.bins) + 3) + "|"]
    for k, budget in enumerate(config.budgets):
        cells = [percent(solved[st.in_bin(blanks, b), k].mean()) for b in config.bins]
        cells += [percent(solved[:, k].mean()), percent(found.accuracy["train"][:, k].mean())]
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    known = f"Training puzzles: the first {len(found.accuracy['train']):,} of the training set."
    text = "A board is solved if every blank is right. Bars: 95 % intervals (Wilson).\n\n" + "\n".join(lines)
    return Section("Accuracy by test-time loops (Fig. 2A)", f"{text}\n\n{known}", ("accuracy",))


def influence_section(config: Config, result: Analysis) -> Section:
    """Energy curves (Fig. 2B) and memorisation."""
    lines = ["| test puzzles | late mass | centre of mass | half of the energy by step |", "|---|---|---|---|"]
    blanks = result.test_blanks
    for bounds in config.bins:
        curves = result.energies[st.in_bin(blanks, bounds)]
        lines.append(
            f"| {label(bounds)} | {percent(result.late[bounds])} | {st.centre_of_mass(curves).mean():.2f} "
            f"| {np.median(st.crossing_step(curves)):g} |"
        )
    steps = config.train.model.steps
    text = (
        "SDI energy of a test puzzle at a step: the sum over training puzzles of the absolute stepwise influence. "
        f"Median and quartiles over the puzzles. Late: steps {(steps + 1) // 2 + 1} to {steps}.\n\n"
        + "\n".join(lines)
        + f"\n\nBlanks of a test puzzle and its late mass: Spearman {result.late_difficulty.rho:.3f} "
        f"({p_value(result.late_difficulty.p)}, n = {len(blanks)})."
    )
    return Section("SDI energy (Fig. 2B) and memorisation", text, ("energy", "memorisation"))


def checkpoint_late_mass(config: Config, found: Found) -> list[tuple[float, float, float]]:
    """At each checkpoint alone: p-value of the difference (Welch), late mass on the easiest and hardest test bin."""
    blanks, result = found.split.test_sample.blanks, []
    for part in found.influences:
        late = st.late_mass(st.energy(part["sdi"].astype(np.float64)))
        easy, hard = (late[st.in_bin(blanks, bounds)] for bounds in (config.bins[0], config.bins[-1]))
        result.append((st.welch(easy, hard), float(easy.mean()), float(hard.mean())))
    return result


def checkpoint_section(config: Config, found: Found) -> Section:
    """What each checkpoint adds: its share of the mass, and when influence acts there."""
    rates, (easy, hard) = found.training["learning_rates"], (config.bins[0], config.bins[-1])
    mass = np.array([r * np.abs(part["tracin"]).sum() for r, part in zip(rates, found.influences, strict=True)])
    lines = [
        f"| update | learning rate | share of mass | late mass, test {label(easy)} | test {label(hard)} | |",
        "|---|---|---|---|---|---|",
    ]
    rows = zip(
        config.train.checkpoint_updates, rates, mass / mass.sum(), checkpoint_late_mass(config, found), strict=True
    )
    for update, rate, share, (p, low, high) in rows:
        lines.append(
            f"| {update:,} | {rate:.2g} | {percent(share)} | {percent(low)} | {percent(high)} | {p_value(p)} |"
        )
    text = (
        "Mass: learning rate times the sum of absolute TracIn over all pairs, before checkpoints are added up (where "
        "influences of different signs cancel).\n\n" + "\n".join(lines)
    )
    return Section("By checkpoint", text)


def table_section(config: Config, result: Analysis) -> Section:
    """Table 1, with the size of the groups beside the shares."""
    table, sizes = result.table, (int(result.easy.sum()), int(result.hard.sum()))
    of = len(result.easy)
    lines = [
        (
            f"| | easy train (≤ {config.easy_at_most} blanks, n = {sizes[0]}) "
            f"| hard train (≥ {config.hard_at_least}, n = {sizes[1]}) | |"
        ),
        "|---|---|---|---|",
        (
            f"| self-influence (median [IQR]) | {table.self_influence[0]} | {table.self_influence[1]} "
            f"| {p_value(table.self_p)} (Welch) |"
        ),
        f"| C (median [IQR]) | {table.mass[0]} | {table.mass[1]} | {p_value(table.mass_p)} (Welch) |",
    ]
    for bounds in table.share:
        share, late = table.share[bounds], table.late[bounds]
        lines += [
            (
                f"| share of mass, test {label(bounds)} | {percent(share.easy)} | {percent(share.hard)} "
                f"| {p_value(share.p)} (paired) |"
            ),
            (
                f"| … over the group's share of the sample | {share.easy * of / sizes[0]:.2f} "
                f"| {share.hard * of / sizes[1]:.2f} | |"
            ),
            (
                f"| SDI late mass, test {label(bounds)} | {percent(late.easy)} | {percent(late.hard)} "
                f"| {p_value(late.p)} (paired) |"
            ),
        ]
    text = (
        "\n".join(lines) + "\n\nA group's share of the mass grows with its size, and the paper does not give the sizes "
        "of its groups; the line below each share divides by them. Puzzles between the groups are in neither."
    )
    return Section("Table 1", text, ("training-groups",))


def exact_section(config: Config, found: Found) -> Section:
    """How much of all this is noise of the sketches: the same statistics from exact gradients."""
    data = found.exact
    blanks, rows = data["train_blanks"], []
    for name in ("exact", "sketched"):
        sdi, tracin, own = (data[f"{name}_{key}"].astype(np.float64) for key in ("sdi", "tracin", "self"))
        rows.append(
            f"| {name} | {st.spearman(blanks, own).rho:.3f} | {st.spearman(blanks, st.cross_mass(tracin)).rho:.3f} "
            f"| {st.spearman(own, st.cross_mass(tracin)).rho:.3f} | {percent(st.late_mass(st.energy(sdi)).mean())} |"
        )
    errors = {
        key: float(
            np.linalg.norm(data[f"sketched_{key}"] - data[f"exact_{key}"]) / np.linalg.norm(data[f"exact_{key}"])
        )
        for key in ("sdi", "tracin")
    }
    text = (
        f"Sums of absolute values take in the noise of the sketches too. {data['exact_sdi'].shape[0]} training and "
        f"{data['exact_sdi'].shape[1]} test puzzles at the last checkpoint, both ways: relative error "
        f"{errors['sdi']:.3f} (SDI), {errors['tracin']:.3f} (TracIn), Frobenius norm.\n\n"
        "| gradients | blanks, self | blanks, C | self, C | late mass |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )
    return Section("Against exact gradients", text)
