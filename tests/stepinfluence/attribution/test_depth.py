"""Trajectories of different depth on one axis, and what people are shown of steps that an example did not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepinfluence import Influence, align_steps, attach, influence, influence_over_checkpoints, self_influence
from stepinfluence.app.cli.influence import _hits
from stepinfluence.search import outliers, rerank, top_k
from stepinfluence.search import scores as scores_of
from stepinfluence.store import Manifest, RowInfo, Store, StoredCheckpoint, StoreWriter
from torch import Tensor, nn

NAN = torch.nan


def test_the_three_alignments() -> None:
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
    lengths = torch.tensor([4, 2, 0])
    for align, expected in {
        "start": [[1.0, 2, 3, 4], [5, 6, NAN, NAN], [NAN] * 4],
        "end": [[1.0, 2, 3, 4], [NAN, NAN, 5, 6], [NAN] * 4],
        "share": [[3.0, 7], [5, 6], [NAN] * 2],
    }.items():
        found = align_steps(values, lengths, align)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    # A step that reaches over several shares is split in proportion: 2 steps in 3 bins, 4 in 3.
    found = align_steps(values[:2], lengths[:2], "share", bins=3)
    thirds = [[1 + 2 / 3, 4 / 3 + 2, 1 + 4.0], [10 / 3, 11 / 3, 4.0]]
    torch.testing.assert_close(found, torch.tensor(thirds))


@pytest.mark.parametrize("bins", [1, 3, 5, 16])
def test_shares_add_up_to_the_whole(bins: int) -> None:
    lengths = torch.randint(1, 8, (6,))
    values = torch.randn(9, 6, 7, dtype=torch.float64) * (torch.arange(7) < lengths[:, None])
    found = align_steps(values, lengths, "share", bins=bins)
    assert found.shape == (9, 6, bins)
    torch.testing.assert_close(found.sum(2), values.sum(2))
    torch.testing.assert_close(align_steps(values, lengths, "end").nansum(2), values.sum(2))


def test_wrong_lengths_are_refused() -> None:
    values = torch.zeros(2, 3, 4)
    for lengths, options, match in (
        (torch.tensor([5, 1, 1]), {}, "lengths: got torch.int64 up to 5"),
        (torch.tensor([1, 1]), {}, r"lengths: got shape \(2,\) for values of shape \(2, 3, 4\)"),
        (torch.tensor([1, 1, 1]), {"bins": 2}, "bins: goes with align='share'"),
        (torch.tensor([1, 1, 1]), {"align": "middle"}, "align: got 'middle'"),
        (torch.tensor([1, 1, 1]), {"align": "share", "bins": 0}, "bins: got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            align_steps(values, lengths, **options)  # type: ignore[arg-type]


class Halting(nn.Module):
    """Every example stops after as many steps as its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for step in range(5):
            state = torch.where((step < x[:, :1]), torch.tanh(self.core(state)), state)
        return self.head(state).squeeze(1)


def loss(model: Any, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1)).square()


def inputs(*depths: int) -> Tensor:
    x = torch.randn(len(depths), 4)
    x[:, 0] = torch.tensor(depths)
    return x


@pytest.fixture
def model() -> Halting:
    return Halting()


@pytest.fixture
def scores(model: Halting) -> Influence:
    capture = attach(model, body="core", sketch_size=16)
    train, query = (capture.featurize([inputs(*d)], loss, progress=False) for d in ((5, 1, 3, 2), (2, 5, 0)))
    return influence(train, query)


def test_results_know_how_many_steps_each_example_took(model: Halting, scores: Influence) -> None:
    assert scores.query_lengths is not None
    assert scores.query_lengths.tolist() == [2, 5, 0]
    assert scores.train_lengths is None
    assert not scores.sdi[:, 0, 2:].any()
    capture = attach(model, body="core", sketch_size=16)
    features = capture.featurize([inputs(5, 1), inputs(3, 2)], loss, progress=False)
    both, train = (influence(features, features.select([1, 2]), decompose=d) for d in ("both", "train"))
    assert both.train_lengths is not None
    assert both.query_lengths is not None
    assert (both.train_lengths.tolist(), both.query_lengths.tolist()) == ([5, 1, 3, 2], [1, 3])
    assert train.query_lengths is None
    found = train.aligned("end")
    assert found.isnan().sum(2).tolist() == [[0, 0], [4, 4], [2, 2], [3, 3]]
    torch.testing.assert_close(found.nansum(2), train.tracin)
    assert [len(hit.trajectory) for hit in train.top(0)] == [[5, 1, 3, 2][row] for row in train.top(0).rows]
    assert "nan" not in repr(train.top(0)) + train.top(0)._repr_html_()
    own = align_steps(self_influence(features), features.lengths, "end")  # type: ignore[arg-type]
    assert own.isnan().sum(1).tolist() == [0, 4, 2, 3]


def test_steps_not_taken_are_absent_from_tables_and_figures(scores: Influence) -> None:
    pandas = pytest.importorskip("pandas")
    hits = scores.top(0)
    assert all(len(hit.trajectory) == 2 for hit in hits)
    assert all(len(hit.trajectory) == 1 and hit.peak_step == 1 for hit in scores.top(2))
    table = scores.to_pandas()
    assert table[table.query_id == 0][["step_2", "step_3"]].notna().all(axis=0).tolist() == [True, False]
    assert pandas.isna(scores.to_arrow().to_pandas().step_3[0])
    lines = [line for line in scores.plot(0).axes[0].lines if line.get_label().count("  ")]
    assert lines
    assert all(len(line.get_xdata()) == 2 for line in lines)
    assert scores.heatmap(0).axes[0].collections[0].get_array().shape == (4, 2)
    assert len(scores.plot_steps(0).axes[0].patches) == 2


@pytest.mark.parametrize("backend", ["matplotlib", "plotly"])
def test_profiles_average_the_queries_that_have_the_step(scores: Influence, backend: Any) -> None:
    pytest.importorskip(backend)

    def bars(**options: Any) -> tuple[Any, Any]:
        figure = scores.plot_steps(backend=backend, **options)
        if backend == "plotly":
            return np.asarray(figure.data[0].x), np.asarray(figure.data[0].y)
        patches = figure.axes[0].patches
        return np.array([p.get_x() + p.get_width() / 2 for p in patches]), np.array([p.get_height() for p in patches])

    sums = scores.sdi.sum(0).numpy()  # (queries, steps), of which 2, 5 and 0 were taken
    places, found = bars()
    np.testing.assert_allclose(places, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(found, [*sums[:2, :2].mean(0), *sums[1, 2:]], rtol=1e-5)
    places, found = bars(align="end")
    np.testing.assert_allclose(places, [-4, -3, -2, -1, 0], atol=1e-12)
    np.testing.assert_allclose(found, [*sums[1, :3], *(sums[0, :2] + sums[1, 3:]) / 2], rtol=1e-5)
    places, found = bars(align="share")
    np.testing.assert_allclose(places, [25, 75])
    np.testing.assert_allclose(found.sum(), sums[:2].sum(1).mean(), rtol=1e-5)


def test_searches_and_stores_keep_the_lengths(model: Halting, tmp_path: Path) -> None:
    features = attach(model, body="core", sketch_size=16).featurize([inputs(5, 1), inputs(3, 0)], loss, progress=False)
    space = features.space
    writer = StoreWriter.create(
        tmp_path / "store", Manifest((StoredCheckpoint("a", 1.0, space),), 4, 2, per_step=True, steps=5, dtype="int8")
    )
    for shard in writer.pending(0):
        part = features.select(list(writer.manifest.rows_of(shard)))
        writer.write_shard(0, shard, part, [RowInfo(str(i)) for i in part.ids])
    writer.finish()
    store = Store.open(tmp_path / "store")
    taken = [5, 1, 3, 0]
    assert store.features().select([2, 1]).lengths.tolist() == [3, 1]  # type: ignore[union-attr]
    for train, query in ((features, features), (store, store)):
        assert scores_of(train, query, progress=False).query_lengths.tolist() == taken  # type: ignore[union-attr]
        assert scores_of(train, query, steps=slice(1, 3), progress=False).query_lengths is None
        found = top_k(train, query, 2, progress=False)
        assert [len(found.trajectory(q, 0)) for q in range(4)] == [5, 1, 3, 1]
        torch.testing.assert_close(found.trajectory(2, 0).sum(), found.scores[2, 0])
        hits = {q: hits for q, _, hits in _hits(found, store)}
        assert [len(hits[q][0]["trajectory"]) for q in range(4)] == [5, 1, 3, 1]
        assert all(len(one.steps) == max(1, taken[one.row]) for one in outliers(train, 4))


def test_exact_influence_tells_the_lengths(model: Halting) -> None:
    capture = attach(model, body="core", sketch_size=16)
    found = rerank(capture, loss, [inputs(5, 1)], [inputs(3, 0), inputs(1, 4, 2)], progress=False)
    assert found.query_lengths is not None
    assert found.query_lengths.tolist() == [3, 0, 1, 4, 2]


def test_depth_may_differ_between_checkpoints(model: Halting, tmp_path: Path) -> None:
    """As it does with adaptive computation time, where it follows from the weights."""

    class Halted(Halting):
        def forward(self, x: Tensor) -> Tensor:
            state = x
            for _ in range(1 + int(self.core.bias[0].detach() > 0)):
                state = torch.tanh(self.core(state))
            return self.head(state).squeeze(1)

    paths = []
    halted = Halted()
    for k, sign in enumerate((-1.0, 1.0)):
        halted.core.bias.data.fill_(sign)
        paths.append(tmp_path / f"{k}.pt")
        torch.save(halted.state_dict(), paths[-1])
    x = inputs(1, 1, 1)
    found = influence_over_checkpoints(
        attach(halted, body="core", sketch_size=16), paths, [x], [x], loss, etas=1.0, progress=False
    )
    assert found.query_lengths is not None
    assert found.query_lengths.tolist() == [2, 2, 2]
    parts = []
    for path in paths:
        halted.load_state_dict(torch.load(path))
        features = attach(halted, body="core", sketch_size=16).featurize([x], loss, progress=False)
        parts.append(influence(features, features).sdi)
    torch.testing.assert_close(found.sdi[..., :1], parts[0] + parts[1][..., :1])
    torch.testing.assert_close(found.sdi[..., 1:], parts[1][..., 1:])
