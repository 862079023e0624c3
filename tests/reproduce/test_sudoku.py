"""The Sudoku experiment end to end at the minute scale, and its statistics against cases made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import multilinear
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats
from stepinfluence import attach
from torch import Tensor
from typer.testing import CliRunner

from reproduce.__main__ import app
from reproduce.base import Run
from reproduce.report import write_report
from reproduce.style import styled
from reproduce.sudoku import measure
from reproduce.sudoku import statistics as st
from reproduce.sudoku.config import CONFIGS, Config
from reproduce.sudoku.model import sudoku_loss
from reproduce.sudoku.run import run

# Two training puzzles, two test puzzles, four steps.
SDI = np.array([[[4.0, -2.0, 1.0, 1.0], [0.0, 1.0, 0.0, -1.0]], [[-1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]]])
TRACIN = SDI.sum(2)  # [[4, 0], [0, 8]]


class _NoMathText(Run[Config]):
    """A run whose figures may not have math text: it is drawn in another typeface than the labels beside it."""

    def figure(self, name: str, figure: Figure) -> str:
        saved = super().figure(name, figure)  # drawn now, so that ticks have their labels
        assert not [text for text in figure.findobj(Text) if "$" in text.get_text()]
        return saved


def test_end_to_end(tmp_path: Path) -> None:
    task = _NoMathText(tmp_path / "run", "sudoku", "minute", CONFIGS["minute"])
    with styled():
        outcome = run(task)
    report = write_report(task, outcome, "python -m reproduce sudoku").parent
    numbers = json.loads((report / "results.json").read_text())["numbers"]
    assert numbers["puzzles_with_more_than_one_solution"] == 0
    check_conservation(task, numbers)
    easy, hard, everyone = numbers["training_group_sizes"]
    assert 0 < easy < everyone == 24
    assert 0 < hard < everyone - easy
    assert len(outcome.comparisons) == 17
    assert sum(c.paper is not None for c in outcome.comparisons) == 17
    shown = re.findall(r"!\[(.+?)\]\(figures/\1\.png\)", outcome.body)
    assert len(shown) == 5
    for name in shown:
        assert (report / "figures" / f"{name}.png").stat().st_size > 1000

    # The stages hold what the report says: recompute two statistics from them, without our functions.
    stages = [np.load(path) for path in sorted((report / "stages").glob("influence-*.npz"))]
    rates = numbers["checkpoint_learning_rates"]
    own = sum(rate * stage["self"] for rate, stage in zip(rates, stages, strict=True))
    mass = np.abs(sum(rate * stage["sdi"].sum(2) for rate, stage in zip(rates, stages, strict=True))).sum(1)
    said = numbers["spearman"]["self-influence, C"]
    assert said["rho"] == pytest.approx(stats.spearmanr(own, mass).statistic)
    # Stepwise influence is of the model that made the predictions: sketches and exact gradients agree.
    exact = np.load(report / "stages" / "exact.npz")
    assert np.linalg.norm(exact["sketched_sdi"] - exact["exact_sdi"]) < 0.25 * np.linalg.norm(exact["exact_sdi"])

    again = Run(tmp_path / "run", "sudoku", "minute", CONFIGS["minute"])
    with styled():
        assert run(again).numbers == outcome.numbers


def test_later_checkpoints_and_other_evaluations(tmp_path: Path) -> None:
    """Influence of the last of two checkpoints, twice, after loop counts that grew: what the scale of hours does."""
    small = CONFIGS["minute"]
    train = dataclasses.replace(small.train, first_mean_steps=1, rise=10)
    config = dataclasses.replace(small, train=train, evaluations=2, influence_from=11)
    task = Run(tmp_path / "run", "sudoku", "minute", config)
    with styled():
        outcome = run(task)
    numbers = outcome.numbers
    names = sorted(path.stem for path in (task.folder / "stages").glob("influence-*.npz"))
    assert names == ["influence-update-0000020", "influence-update-0000020-evaluation-1"]
    first, second = (np.load(task.folder / "stages" / f"{name}.npz") for name in names)
    rate = numbers["checkpoint_learning_rates"]
    assert len(rate) == 1
    said = numbers["over_evaluations"]["Spearman: self-influence, C"]
    for value, stage in zip(said, (first, second), strict=True):
        mass = np.abs(stage["tracin"]).sum(1)
        assert value == pytest.approx(stats.spearmanr(stage["self"], mass).statistic)
    assert not np.array_equal(first["self"], second["self"])
    assert "evaluated 2 times" in outcome.body
    assert "from update 11 on" in outcome.body


def test_loop_counts_that_rise() -> None:
    config = dataclasses.replace(CONFIGS["paper"].train, updates=3000, checkpoints=2, first_mean_steps=4, rise=2000)
    counts = config.loop_counts().double()
    plain = dataclasses.replace(config, rise=0).loop_counts()
    assert torch.equal(counts[2000:], plain[2000:].double())
    # Means of 1000: rate + 1, standard error below 0.03 of it (variance mean + 0.28 mean^2), four of them
    for part, mean in ((counts[:1000], 11.0), (counts[1000:2000], 25.0), (counts[2000:], 32.0)):
        assert abs(float(part.mean()) - mean - 1) < 0.12 * mean
    late = dataclasses.replace(config, rise_from=1000).loop_counts().double()
    for part, mean in ((late[:1000], 4.0), (late[1000:2000], 18.0)):
        assert abs(float(part.mean()) - mean - 1) < 0.12 * mean
    assert torch.equal(late[2000:], counts[2000:])
    with pytest.raises(ValueError, match=r"^rise_from: got 2000; pass less than rise=2000"):
        dataclasses.replace(config, rise_from=2000)
    with pytest.raises(ValueError, match=r"^rise: got 3000; pass less than updates=3000"):
        dataclasses.replace(config, rise=3000)


def check_conservation(task: Run[Config], numbers: dict[str, Any]) -> None:
    """Of all pairs the largest difference between TracIn and the sum of its steps: sums of the same products."""
    split = measure.parts(task.config, measure.as_set(task.config, np.load(task.folder / "stages" / "puzzles.npz")))
    sides: list[Tensor] = []
    for path in sorted(task.checkpoints.glob("*.pt")):
        model = measure.load_model(task.config, path)
        capture = attach(model, body=model.block, sketch_size=task.config.sketch_size, seed=task.config.seed)
        for data in (split.train_sample, split.test_sample):
            batches = data.batches(task.config.batch_size, "cpu")
            sides.append(capture.featurize(batches, sudoku_loss, progress=False).values)
    rates = numbers["checkpoint_learning_rates"]
    assert len(sides) == 2 * len(rates)

    def tracin(*values: Tensor, first: int = 0) -> Tensor:
        pairs = zip(rates, values[::2], values[1::2], strict=True)
        return sum(r * torch.einsum("nsd,qtd->nq", left, right[:, first:]) for r, left, right in pairs)  # type: ignore[return-value]

    expected = multilinear(tracin, *sides, rows=False)
    without_first = tracin(*(values.double() for values in sides), first=1)
    found = numbers["conservation_relative_discrepancy"]
    expected.check_difference(found, lambda difference, size: difference.max() / size.max(), without_first)


def test_the_paper_profile_is_the_papers() -> None:
    config = CONFIGS["paper"]
    model, train = config.train.model, config.train
    assert (model.side, model.d_model, model.n_heads, model.positions, model.steps) == (9, 128, 4, "cell", 32)
    assert (train.mean_steps, train.max_steps) == (32, 64)
    assert (min(config.budgets), max(config.budgets)) == (4, 64)
    assert (config.sample, config.sketch_size, config.puzzles) == (512, 2048, 10_000)
    assert (config.easy_at_most, config.hard_at_least) == (42, 45)
    assert config.bins == ((46, 47), (48, 48), (49, 50))


def test_satnets_boards_need_the_papers_board(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use --scale paper"):
        measure.puzzles(dataclasses.replace(CONFIGS["cpu"], data=str(tmp_path)))


def test_a_missing_solver_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysat", None)
    result = CliRunner().invoke(app, ["sudoku", "--scale", "minute", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.output.startswith("python -m reproduce: ")
    assert "pip install 'sdi-kernels[sudoku]'" in result.output
    assert not (tmp_path / "run").exists()


def test_bins_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="bins: got"):
        Config(bins=((48, 48), (46, 47)))


def test_masses_shares_and_energies_by_hand() -> None:
    np.testing.assert_allclose(st.cross_mass(np.array([[4.0, -3.0], [0.0, 8.0]])), [7, 8])
    np.testing.assert_allclose(st.energy(SDI), [[5, 2, 1, 2], [2, 3, 2, 3]])
    np.testing.assert_allclose(st.energy(SDI, np.array([False, True])), [[1, 0, 0, 1], [2, 2, 2, 2]])
    np.testing.assert_allclose(st.shares(np.array([[1.0, -6.0], [-3.0, 2.0]]), np.array([True, False])), [0.25, 0.75])
    np.testing.assert_allclose(st.late_mass(st.energy(SDI)), [0.3, 0.5])


def test_late_steps_are_17_to_32_of_32() -> None:
    curves = np.zeros((2, 32))
    curves[0, 15], curves[1, 16] = 1, 1  # steps 16 and 17
    np.testing.assert_allclose(st.late_mass(curves), [0, 1])


def test_timing_summaries_by_hand() -> None:
    curves = np.array([[1.0, 0, 0, 1], [0, 0, 4, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(st.centre_of_mass(curves), [2.5, 3, 2.5])
    assert st.crossing_step(curves).tolist() == [1, 3, 2]
    assert st.crossing_step(curves, 0.9).tolist() == [4, 3, 4]
    low, median, high = st.band(np.array([[1.0], [2], [3], [4], [5]]))
    assert (low[0], median[0], high[0]) == (2, 3, 4)


def test_bins_hold_both_ends() -> None:
    assert st.in_bin(np.array([45, 46, 47, 48]), (46, 47)).tolist() == [False, True, True, False]


def test_few_memorised_but_broad_puzzles_are_found() -> None:
    own = np.arange(8.0)
    assert st.memorised_least_but_broad(own, own) == 0
    assert st.memorised_least_but_broad(own, own[::-1]) == 2


def test_tests_are_two_sided_and_of_their_kind() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.1, 2.1, 3.1, 4.2])
    assert st.paired(a, b) < 0.02 < 0.5 < st.welch(a, b)  # a small difference, in every pair
    assert st.paired(a, b) == pytest.approx(st.paired(b, a))
    # Welch by hand: equal means differ by 0; unequal variances give Satterthwaite's degrees of freedom.
    x, y = np.array([0.0, 1, 2]), np.array([0.0, 10, 20, 30])
    sx, sy = x.var(ddof=1) / 3, y.var(ddof=1) / 4
    t, df = (x.mean() - y.mean()) / (sx + sy) ** 0.5, (sx + sy) ** 2 / (sx**2 / 2 + sy**2 / 3)
    assert st.welch(x, y) == pytest.approx(2 * stats.t.sf(abs(t), df))
    assert st.spearman(np.arange(6), np.array([0, 1, 4, 9, 16, 25])).rho == pytest.approx(1)


def test_table_one_by_hand() -> None:
    sdi = np.tile(SDI, (1, 2, 1))  # each test puzzle twice
    sdi[:, 2:] *= np.array([[[1.0], [2.0]], [[3.0], [1.0]]])
    tracin, own = sdi.sum(2), np.array([1.0, 5.0])
    easy, hard = np.array([True, False]), np.array([False, True])
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning):  # groups of one have no variance
        table = st.table_one(sdi, tracin, own, easy, hard, np.array([46, 49, 47, 50]), [(46, 47), (49, 50)])
    assert [q.median for q in table.self_influence] == [1, 5]
    assert [q.median for q in table.mass] == [8, 16]
    share, late = table.share[(46, 47)], table.late[(46, 47)]
    assert (share.easy, share.hard) == (1, 0)  # puzzle 1 has all of TracIn on test puzzles 0 and 2
    assert late.easy == pytest.approx(0.25)  # |1| + |1| of 8, both times
    assert late.hard == pytest.approx(0.5)
    assert (table.share[(49, 50)].easy, table.share[(49, 50)].hard) == (0, 1)


def test_empty_groups_are_refused() -> None:
    nobody = np.array([False, False])
    with pytest.raises(ValueError, match="easy: no training puzzle"):
        st.table_one(SDI, TRACIN, np.arange(2.0), nobody, ~nobody, np.array([46, 47]), [(46, 47)])
    with pytest.raises(ValueError, match="no test puzzle has 49 to 50 blanks"):
        st.table_one(SDI, TRACIN, np.arange(2.0), ~nobody, ~nobody, np.array([46, 47]), [(49, 50)])


def test_intervals_of_shares() -> None:
    low, high = st.wilson(0, 10)
    assert low == 0
    assert high == pytest.approx(1.959964**2 / (10 + 1.959964**2), rel=1e-5)  # Wilson's formula at zero
