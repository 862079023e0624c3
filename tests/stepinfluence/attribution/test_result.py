"""Scores as people look at them: short in a console, tables, figures and data frames that hold the right numbers."""

from __future__ import annotations

import html
import re
from typing import Any

import numpy as np
import pytest
import stepinfluence
import torch
from stepinfluence.attribution.result import Influence
from stepinfluence.display.table import Hits, sparkline

pytest.importorskip("matplotlib")
N, Q, STEPS = 30, 4, 6


@pytest.fixture
def scores() -> Influence:
    generator = torch.Generator().manual_seed(0)
    return Influence(
        torch.randn(N, Q, STEPS, generator=generator),
        "query",
        tuple(f"z{k}" for k in range(N)),
        tuple(range(100, 100 + Q)),
        (0.1, 0.2),
    )


@pytest.fixture
def matrix() -> Influence:
    return Influence(torch.randn(5, 2, 3, 4), "both", tuple(range(5)), ("a", "b"), (1.0,))


def test_a_console_is_not_flooded(scores: Influence, matrix: Influence) -> None:
    assert repr(scores) == "Influence(30 training examples × 4 queries × 6 query steps, 2 checkpoints)"
    assert repr(matrix) == "Influence(5 training examples × 2 queries × 3 × 4 training × query steps, 1 checkpoint)"


def test_top_is_a_table(scores: Influence) -> None:
    texts = [f"text of {k}\n\x1b[2J" for k in range(N)]
    found = scores.with_texts(train=texts).top(2, k=3)
    order = scores.tracin[:, 2].argsort(descending=True)[:3].tolist()
    assert found.rows == order
    assert found.ids == [f"z{k}" for k in order]
    first = found[0]
    trajectory = scores.sdi[order[0], 2]
    assert first.text == texts[order[0]]
    assert first.score == pytest.approx(float(trajectory.sum()), rel=1e-6)
    assert first.peak_step == 1 + int(trajectory.abs().argmax())
    assert np.array_equal(first.trajectory, trajectory.numpy())
    lines = repr(found).splitlines()
    assert lines[0] == "Most helpful for query 102"
    assert len(lines) == 5
    assert f"step {first.peak_step}" in lines[2]
    assert f"text of {order[0]}⏎\\u001b[2J" in lines[2]  # an example cannot draw on the terminal
    assert isinstance(found[:2], Hits)
    assert found[:2].rows == order[:2]
    assert scores.top(2, 1, largest=False).rows == [int(scores.tracin[:, 2].argmin())]
    assert "by loop step 4" in repr(scores.top(0, step=3))
    assert repr(Hits([], "Nothing")).startswith("Nothing")


def test_texts_by_id_or_in_a_row(scores: Influence) -> None:
    some = scores.with_texts(train={"z3": "three"}, query=["a", None, "c", "d"])
    assert some.train_texts[3] == "three"
    assert some.train_texts[4] is None
    assert "“c”" in repr(some.top(2))
    assert "query 101" in repr(some.top(1))
    with pytest.raises(ValueError, match="train: got 2 texts for 30 examples"):
        scores.with_texts(train=["a", "b"])
    with pytest.raises(ValueError, match="query: got a string for 4 examples"):
        scores.with_texts(query="abcd")


def test_html_holds_the_numbers_and_no_markup_of_an_example(scores: Influence) -> None:
    hostile = "<script>alert(1)</script>"
    page = scores.with_texts(train=[hostile] * N, query=[hostile] * Q)._repr_html_()
    assert "<script" not in page
    assert html.escape(hostile) in page
    assert page.count("<table>") == 3
    assert "and 1 more queries" in page
    assert page.count("<svg") == 3 * 5


def test_a_sparkline_goes_up_where_it_helps() -> None:
    drawn = sparkline(np.array([4.0, -1.0, 0.0]), 4.0, width=30, height=20)
    bars = [
        {k: float(v) for k, v in re.findall(r'(x|y|width|height)="([\d.]+)"', bar)}
        for bar in re.findall(r"<rect[^>]*>", drawn)
    ]
    assert [b["height"] for b in bars] == [9.0, 4.5, 0.0]
    assert [b["y"] for b in bars] == [1.0, 10.0, 10.0]
    assert "nan" not in sparkline(np.zeros(3), 0.0)


def test_matplotlib_figures_hold_the_numbers(scores: Influence) -> None:
    figure = scores.plot(1, k=2)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == STEPS]
    order = scores.tracin[:, 1].argsort(descending=True).tolist()
    for line, row in zip(lines, [*order[:2], order[-1], order[-2]], strict=True):
        np.testing.assert_allclose(line.get_ydata(), scores.sdi[row, 1])
        assert line.get_label().startswith(f"z{row} ")
    profile = scores.plot_steps().axes[0]
    np.testing.assert_allclose(
        [bar.get_height() for bar in profile.patches], scores.sdi.sum(0).mean(0).numpy(), rtol=1e-6
    )
    np.testing.assert_allclose(profile.lines[0].get_ydata(), scores.energy().mean(0).numpy(), rtol=1e-6)
    mesh = scores.heatmap(0, k=7).axes[0].collections[0]
    rows = scores.tracin[:, 0].abs().argsort(descending=True)[:7]
    np.testing.assert_allclose(mesh.get_array(), scores.sdi[rows, 0])
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_plotly_figures_hold_the_numbers(scores: Influence) -> None:
    pytest.importorskip("plotly")
    figure = scores.with_texts(train=["<b>bold</b>"] * N).plot(1, k=2, backend="plotly")
    assert len(figure.data) == 4
    best = int(scores.tracin[:, 1].argmax())
    np.testing.assert_allclose(figure.data[0].y, scores.sdi[best, 1])
    assert figure.data[0].name.startswith("&lt;b&gt;bold")
    bars, line = scores.plot_steps(2, backend="plotly").data
    np.testing.assert_allclose(bars.y, scores.sdi[:, 2].sum(0), rtol=1e-6)
    np.testing.assert_allclose(line.y, scores.energy()[2], rtol=1e-6)
    assert scores.heatmap(0, k=7, backend="plotly").data[0].z.shape == (7, STEPS)


@pytest.mark.parametrize("backend", ["matplotlib", "plotly"])
def test_step_matrices_are_heatmaps(matrix: Influence, backend: Any) -> None:
    pytest.importorskip(backend)
    values = {}
    for row in (None, 3):
        figure = matrix.heatmap(1, row=row, backend=backend)
        found = figure.axes[0].collections[0].get_array() if backend == "matplotlib" else figure.data[0].z
        values[row] = np.asarray(found).reshape(3, 4)
    np.testing.assert_allclose(values[None], matrix.sdi[:, 1].sum(0), rtol=1e-6)
    np.testing.assert_allclose(values[3], matrix.sdi[3, 1])
    for method in (matrix.top, matrix.plot, matrix.plot_steps, matrix.to_pandas):
        with pytest.raises(ValueError, match=f"{method.__name__}: defined for one step axis"):
            method()


def test_data_frames(scores: Influence) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = scores.with_texts(query=list("abcd")).to_pandas()
    assert list(frame.columns[:4]) == ["train_id", "query_id", "query_text", "score"]
    assert len(frame) == N * Q
    one = frame[(frame.train_id == "z7") & (frame.query_id == 102)].iloc[0]
    np.testing.assert_allclose([one[f"step_{t + 1}"] for t in range(STEPS)], scores.sdi[7, 2])
    assert one["score"] == pytest.approx(float(scores.tracin[7, 2]), rel=1e-6)
    assert one["query_text"] == "c"
    assert scores.to_arrow().to_pandas()["score"].tolist() == frame["score"].tolist()
    mixed = Influence(scores.sdi, "query", (1, *scores.train_ids[1:]), scores.query_ids, scores.etas)
    assert mixed.to_arrow()["train_id"][0].as_py() == "1"
    top = scores.top(0, 3)
    assert top.to_pandas()["row"].tolist() == top.rows


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.top(9), "query: got column 9; there are columns 0 to 3"),
        (lambda s: s.top("z1"), "query: got str 'z1'"),
        (lambda s: s.top(0, 0), "k: got 0"),
        (lambda s: s.top(0, step=6), "step: got 6; there are steps 0 to 5"),
        (lambda s: s.plot(-1), "query: got -1"),
        (lambda s: s.plot(0, backend="excel"), "backend: got 'excel'; pass one of 'matplotlib', 'plotly'"),
        (lambda s: s.heatmap(0, row=1), "row: goes with decompose='both'"),
    ],
)
def test_wrong_arguments_say_what_fits(scores: Influence, ask: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ask(scores)


def test_it_is_what_influence_returns() -> None:
    assert stepinfluence.Influence is Influence
