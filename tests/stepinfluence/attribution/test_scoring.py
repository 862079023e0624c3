"""Influence scores against the paper's equations written out, and over checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import multilinear
from stepinfluence import ExactCapture, Features, Fisher, attach, influence, influence_over_checkpoints, self_influence
from stepinfluence.attribution.space import Block, FeatureSpace
from stepinfluence.errors import CheckpointError, FeatureMismatchError
from stepinfluence.models import LoopedGPT, LoopedGPTConfig, gpt_loss
from torch import Tensor

WIDTH = 11


def features(rows: int, steps: int | None, seed: int = 0, weights: str = "w", prefix: str = "z") -> Features:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, WIDTH) if steps is None else (rows, steps, WIDTH)
    return Features(
        values=torch.randn(shape, generator=generator, dtype=torch.float64),
        losses=torch.zeros(rows),
        steps=torch.full((rows,), steps or 1),
        lengths=None,
        ids=tuple(f"{prefix}{k}" for k in range(rows)),
        space=FeatureSpace("sketch", (Block("w", (WIDTH,), 0, WIDTH),), "t", weights),
    )


@pytest.mark.parametrize(("n", "q", "s", "t"), [(4, 3, 2, 5), (1, 1, 1, 1), (1, 3, 4, 2), (5, 1, 3, 3), (6, 2, 1, 4)])
def test_equations(n: int, q: int, s: int, t: int) -> None:
    train, query = features(n, s, 1), features(q, t, 2)
    g, p = train.values, query.values
    by_query = influence(train, query, etas=0.5)
    torch.testing.assert_close(by_query.sdi, 0.5 * torch.einsum("nsd,qtd->nqt", g, p))  # eqs. 5 and 7
    by_train = influence(train, query, etas=0.5, decompose="train")
    torch.testing.assert_close(by_train.sdi, 0.5 * torch.einsum("nsd,qtd->nqs", g, p))  # eq. 8
    both = influence(train, query, etas=0.5, decompose="both")
    torch.testing.assert_close(both.sdi, 0.5 * torch.einsum("nsd,qtd->nqst", g, p))  # eq. 9
    total = 0.5 * torch.einsum("nsd,qtd->nq", g, p)  # eq. 6
    for scores in (by_query, by_train, both):
        torch.testing.assert_close(scores.tracin, total)
        assert scores.train_ids == train.ids
        assert scores.query_ids == query.ids
        assert scores.etas == (0.5,)
    torch.testing.assert_close(by_query.energy(), by_query.sdi.abs().sum(0))


def test_summed_features_do_where_no_steps_are_asked_for() -> None:
    train, query = features(4, 3, 1), features(2, 5, 2)
    expected = influence(train, query)
    torch.testing.assert_close(influence(train.summed(), query).sdi, expected.sdi)
    torch.testing.assert_close(
        influence(train, query.summed(), decompose="train").sdi, influence(train, query, decompose="train").sdi
    )
    with pytest.raises(ValueError, match="query: features are summed over steps; featurize with per_step=True"):
        influence(train, query.summed())
    with pytest.raises(ValueError, match="train: features are summed over steps"):
        influence(train.summed(), query, decompose="both")


@pytest.mark.parametrize("decompose", ["query", "train", "both"])
def test_checkpoints_with_different_loop_counts(decompose: Any) -> None:
    """Steps are counted from the start: a checkpoint that ran fewer adds nothing to the later ones."""
    trains = [features(4, 2, 1, "a"), features(4, 4, 2, "b")]
    queries = [features(3, 5, 3, "a"), features(3, 3, 4, "b")]
    etas = [0.1, 0.7]
    found = influence(trains, queries, etas=etas, decompose=decompose)
    expected = torch.zeros(4, 3, 4, 5, dtype=torch.float64)
    for train, query, eta in zip(trains, queries, etas, strict=True):
        block = eta * torch.einsum("nsd,qtd->nqst", train.values, query.values)
        expected[:, :, : block.shape[2], : block.shape[3]] += block
    expected = {"query": expected.sum(2), "train": expected.sum(3), "both": expected}[decompose]
    torch.testing.assert_close(found.sdi, expected)
    assert found.etas == (0.1, 0.7)
    torch.testing.assert_close(
        influence(trains, queries, etas=2.0).sdi, influence(trains, queries, etas=[2.0, 2.0]).sdi
    )


def test_self_influence_is_the_diagonal() -> None:
    trains = [features(5, 3, 1, "a"), features(5, 3, 2, "b")]
    steps = self_influence(trains, etas=[0.2, 0.3])
    full = influence(trains, trains, etas=[0.2, 0.3])
    torch.testing.assert_close(steps, full.sdi.diagonal().T)
    torch.testing.assert_close(steps.sum(1), full.tracin.diagonal())
    torch.testing.assert_close(self_influence([t.summed() for t in trains], etas=[0.2, 0.3]), steps.sum(1))
    with pytest.raises(ValueError, match="some checkpoints are summed over steps"):
        self_influence([features(5, 3, 1), features(5, 2, 1).summed()])


def test_checkpoints_at_which_depth_differs() -> None:
    """Adaptive computation time takes other numbers of steps at other weights."""
    trains, queries = [features(5, 3, 1), features(5, 2, 2)], [features(4, 2, 3), features(4, 4, 4)]
    parts = [influence(t, q) for t, q in zip(trains, queries, strict=True)]
    whole = influence(trains, queries)
    assert whole.sdi.shape == (5, 4, 4)
    torch.testing.assert_close(whole.sdi[..., :2], parts[0].sdi + parts[1].sdi[..., :2])
    torch.testing.assert_close(whole.sdi[..., 2:], parts[1].sdi[..., 2:])
    alone = [self_influence(t) for t in trains]
    together = self_influence(trains)
    torch.testing.assert_close(together[:, :2], alone[0][:, :2] + alone[1])
    torch.testing.assert_close(together[:, 2:], alone[0][:, 2:])


def test_ranking() -> None:
    scores = influence(features(6, 2, 1), features(2, 3, 2))
    order = scores.tracin[:, 1].argsort(descending=True).tolist()
    assert scores.top(1, 3).rows == order[:3]
    assert scores.top(1, 99).rows == order
    assert scores.top(1, 2, largest=False).rows == order[::-1][:2]
    assert scores.top(0, 1, step=2).rows == [int(scores.sdi[:, 0, 2].argmax())]
    with pytest.raises(ValueError, match="energy: defined for one step axis"):
        influence(features(2, 2), features(2, 2), decompose="both").energy()


def test_features_are_not_changed() -> None:
    train, query = features(4, 3, 1), features(2, 5, 2)
    before = train.values.clone(), query.values.clone()
    for decompose in ("query", "train", "both"):
        influence(train, query, decompose=decompose)  # type: ignore[arg-type]
    assert torch.equal(train.values, before[0])
    assert torch.equal(query.values, before[1])


def test_bad_input() -> None:
    train, query = features(4, 3), features(2, 3)
    with pytest.raises(ValueError, match="decompose: got 'steps'; use 'query', 'train' or 'both'"):
        influence(train, query, decompose="steps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got features of 1 and 2 checkpoints"):
        influence(train, [query, query])
    with pytest.raises(ValueError, match="got features of 0 and 0 checkpoints"):
        influence([], [])
    with pytest.raises(TypeError, match="etas: got str 'high'; give a number"):
        influence(train, query, etas="high")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="etas: got 3 for 1 checkpoints; give one per checkpoint"):
        influence(train, query, etas=[1, 2, 3])
    with pytest.raises(FeatureMismatchError, match=r"train: .*different examples"):
        influence([train, features(4, 3, prefix="other")], [query, query])
    with pytest.raises(FeatureMismatchError, match=r"query: .*different examples"):
        influence([train, train], [query, replace(query, ids=("a", "b"))])
    with pytest.raises(FeatureMismatchError, match="other weights"):
        influence([train, train], [query, features(2, 3, weights="v")])


# --------------------------------------------------------------------------------------------------------------------
# Over checkpoints


def batches(sizes: list[int], seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{k: torch.randint(61, (size, 6), generator=generator) for k in ("tokens", "targets")} for size in sizes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoopedGPT, list[Path]]:
    """A model after training, and its checkpoints with their optimizer states; tests leave it as it was."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = LoopedGPT(LoopedGPTConfig.tiny()).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    paths = []
    for step, (batch, rate) in enumerate(zip(batches([8, 8, 8], 5), (1e-2, 5e-3, 2e-3), strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        path = folder / f"{step}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        paths.append(path)
        optimizer.zero_grad()
        gpt_loss(model, batch).mean().backward()
        optimizer.step()
    return model, paths


TRAIN, QUERY = batches([3, 2], 1), batches([2], 2)


@pytest.fixture(scope="module")
def featurized(run: tuple[LoopedGPT, list[Path]]) -> list[tuple[Any, list[list[Features]]]]:
    """Either capture, and what it makes of both sides at every checkpoint."""
    model, paths = run
    before = {k: v.clone() for k, v in model.state_dict().items()}
    captures = attach(model, body="core", sketch_size=64), ExactCapture(model, body="core")
    found: list[tuple[Any, list[list[Features]]]] = [(capture, [[], []]) for capture in captures]
    for path in paths:
        model.load_state_dict(torch.load(path)["model"])
        for capture, sides in found:
            for side, data in zip(sides, (TRAIN, QUERY), strict=True):
                side.append(capture.featurize(data, gpt_loss))
    model.load_state_dict(before)
    return found


@pytest.mark.numeric
@pytest.mark.parametrize("etas", ["optimizer", 0.5, [0.3, 0.2, 0.1]])
@pytest.mark.parametrize("decompose", ["query", "train", "both"])
def test_over_checkpoints(
    run: tuple[LoopedGPT, list[Path]], featurized: list[tuple[Any, list[list[Features]]]], etas: Any, decompose: Any
) -> None:
    model, paths = run
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for capture, sides in featurized:
        found = influence_over_checkpoints(
            capture, paths, TRAIN, QUERY, gpt_loss, etas=etas, decompose=decompose, progress=False
        )
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        given = [1e-2, 5e-3, 2e-3] if etas == "optimizer" else etas
        expected = influence(*sides, etas=given, decompose=decompose)
        values = [f.values for side in sides for f in side]

        def plain(*v: Tensor, given: Any = given) -> Tensor:
            equation = {"query": "nsd,qtd->nqt", "train": "nsd,qtd->nqs", "both": "nsd,qtd->nqst"}[decompose]
            scale = given if isinstance(given, list) else [given] * len(paths)
            return sum(eta * torch.einsum(equation, v[k], v[k + len(paths)]) for k, eta in enumerate(scale))  # type: ignore[return-value]

        held_against = multilinear(plain, *values, rows=False)
        held_against.check(found.sdi, "over checkpoints:")
        held_against.check(expected.sdi, "features kept:")
        assert found.etas == expected.etas
        assert found.train_ids == expected.train_ids


def test_over_checkpoints_puts_weights_back_after_a_failure(run: tuple[LoopedGPT, list[Path]]) -> None:
    model, paths = run
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = 0

    def failing(m: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyError("boom")
        return gpt_loss(m, batch)

    capture = attach(model, body="core", sketch_size=16)
    with pytest.raises(KeyError):
        influence_over_checkpoints(capture, paths, batches([2], 1), batches([2], 2), failing, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_over_checkpoints_bad_input(run: tuple[LoopedGPT, list[Path]], tmp_path: Path) -> None:
    model, paths = run
    capture = attach(model, body="core", sketch_size=16)
    train, query = batches([2], 1), batches([2], 2)

    def scores(given: Any, **kwargs: Any) -> Any:
        return influence_over_checkpoints(
            capture, given, kwargs.pop("train", train), query, gpt_loss, progress=False, **kwargs
        )

    with pytest.raises(ValueError, match="checkpoints: got none"):
        scores([])
    with pytest.raises(ValueError, match="etas: got 1 for 3 checkpoints"):
        scores(paths, etas=[1.0])
    with pytest.raises(ValueError, match="etas: got 'adam'"):
        scores(paths, etas="adam")
    with pytest.raises(ValueError, match=r"etas: got \[0.1, nan, 0.1\]; give finite numbers"):
        scores(paths, etas=[0.1, float("nan"), 0.1])
    with pytest.raises(TypeError, match=r"etas: got str '0\.1'; give a number, or one per checkpoint"):
        scores(paths, etas=[0.1, "0.1", 0.1])
    plain = tmp_path / "plain.pt"
    torch.save(model.state_dict(), plain)
    with pytest.raises(CheckpointError, match=r"plain\.pt: no learning rate in it.*etas=1\.0"):
        scores([plain])
    one = scores([plain], etas=1.0)
    for path in (plain, str(plain)):  # not a list of letters
        assert torch.equal(scores(path, etas=1.0).sdi, one.sdi)
    with pytest.raises(FeatureMismatchError, match="different examples"):
        scores(paths, train=iter(batches([2], 1)))


@pytest.mark.parametrize("metric", [None, "adam"])
@pytest.mark.parametrize("decompose", ["query", "train", "both"])
def test_over_checkpoints_each_with_its_own_curvature(
    run: tuple[LoopedGPT, list[Path]], decompose: Any, metric: Any
) -> None:
    """Also under an optimizer's metric: the Fisher is that of the features in the metric."""
    model, paths = run
    paths = paths[1:]  # the first has no state of the optimizer yet
    capture = attach(model, body="core", sketch_size=64)
    given: dict[str, Any] = {"etas": 0.5, "metric": metric, "decompose": decompose, "progress": False}
    train, query = batches([3, 2], 1), batches([2], 2)
    correction: dict[str, Any] = {"curvature": "fisher", "damping": 1e-2}
    found = influence_over_checkpoints(capture, paths, train, query, gpt_loss, **given, **correction)
    each = [
        influence_over_checkpoints(capture, [path], train, query, gpt_loss, **given, **correction) for path in paths
    ]
    torch.testing.assert_close(found.sdi, each[0].sdi + each[1].sdi)
    assert found.energies is not None
    torch.testing.assert_close(found.energies, torch.cat([one.energies for one in each if one.energies is not None]))
    assert found.shares is not None
    torch.testing.assert_close(found.shares.sum(0), torch.ones(2))
    plain = influence_over_checkpoints(capture, paths, train, query, gpt_loss, **given)
    assert not torch.allclose(plain.sdi, found.sdi)
    fitted = Fisher.fit(capture.featurize(train, gpt_loss), damping=1e-2)
    with pytest.raises(ValueError, match="curvature: got 1 for 2 checkpoints"):
        influence_over_checkpoints(capture, paths, train, query, gpt_loss, curvature=fitted, **given)
