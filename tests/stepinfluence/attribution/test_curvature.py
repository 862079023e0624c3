"""Curvature-corrected influence against dense inverses in float64: sums over steps, low ranks, damping, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stepinfluence
import torch
from stepinfluence import BlockFisher, Features, FeatureSpace, Fisher, influence, self_influence
from stepinfluence.attribution.curvature import damping as auto
from stepinfluence.attribution.curvature import factors, fisher, load, save
from stepinfluence.attribution.curvature.choice import unit_norm
from stepinfluence.attribution.space import Block
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.search import outliers
from torch import Tensor

pytestmark = pytest.mark.numeric

BLOCKS = (Block("a", (3, 3), 0, 9), Block("b", (5,), 9, 14))
WIDTH = 14


def features(rows: int, steps: int | None, seed: int = 0, *, weights: str = "w", prefix: str = "z") -> Features:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, WIDTH) if steps is None else (rows, steps, WIDTH)
    # Columns of very different sizes: a Fisher that is far from a multiple of one.
    scale = torch.logspace(0.5, -1.5, WIDTH, dtype=torch.float64)
    return Features(
        values=torch.randn(shape, generator=generator, dtype=torch.float64) * scale,
        losses=torch.rand(rows, generator=generator),
        steps=torch.full((rows,), steps or 1),
        lengths=None,
        ids=tuple(f"{prefix}{k}" for k in range(rows)),
        space=FeatureSpace("sketch", BLOCKS, "t", weights),
    )


def dense(train: Features, damping: float, cuts: tuple[slice, ...] = (slice(0, WIDTH),)) -> Tensor:
    """The inverse itself, ``(D, D)``."""
    grads = train.summed().values.double()
    out = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for cut in cuts:
        gram = grads[:, cut].T @ grads[:, cut] / len(grads)
        largest = torch.linalg.eigvalsh(gram)[-1]
        out[cut, cut] = torch.linalg.inv(gram + damping * largest * torch.eye(len(gram), dtype=torch.float64))
    return out


PARTS = (slice(0, 9), slice(9, 14))


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("decompose", ["query", "train", "both"])
def test_equals_the_dense_inverse_and_conserves(rows: int, kind: Any, damping: float, decompose: Any) -> None:
    """Rows fewer than columns, and more: through their inner products, and through the matrix."""
    train, query = features(rows, 3, 1), features(4, 2, 2, prefix="q")
    inverse = dense(train, damping, PARTS if kind is BlockFisher else (slice(0, WIDTH),))
    found = influence(train, query, etas=0.5, decompose=decompose, curvature=kind.kind, damping=damping)
    equation = {"query": "nsd,qtd->nqt", "train": "nsd,qtd->nqs", "both": "nsd,qtd->nqst"}[decompose]
    expected = 0.5 * torch.einsum(equation, train.values, query.values @ inverse)
    torch.testing.assert_close(found.sdi, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    whole = 0.5 * train.summed().values @ inverse @ query.summed().values.T
    assert float((found.tracin - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
    fitted = kind.fit(train, damping=damping)
    again = influence(train, query, etas=0.5, decompose=decompose, curvature=fitted)
    torch.testing.assert_close(again.sdi, found.sdi)


def test_conserves_in_float32() -> None:
    train, query = (replace(f, values=f.values.float()) for f in (features(20, 3, 1), features(4, 5, 2)))
    found = influence(train, query, curvature="fisher", damping=1e-3)
    whole = influence(train, query.summed(), curvature="fisher", damping=1e-3, decompose="train")
    assert float((found.tracin - whole.tracin).abs().max()) <= 1e-6 * float(found.sdi.abs().sum(2).max())


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_leverage(kind: Any) -> None:
    train = features(12, 3, 1)
    inverse = dense(train, 1e-2, PARTS if kind is BlockFisher else (slice(0, WIDTH),))
    grads = train.summed().values
    steps = self_influence(train, curvature=kind.kind, damping=1e-2)
    torch.testing.assert_close(steps, torch.einsum("nsd,nd->ns", train.values, grads @ inverse))
    total = self_influence(train.summed(), curvature=kind.kind, damping=1e-2)
    torch.testing.assert_close(total, steps.sum(1))
    fitted = kind.fit(train, damping=1e-2)
    torch.testing.assert_close(fitted.leverage(train), steps)
    # The leverages' mean is the effective dimension.
    torch.testing.assert_close(float(total.mean()), fitted.effective_dimension)


def test_each_checkpoint_has_its_own() -> None:
    """A checkpoint whose gradients are a thousand times larger owns the plain sum, and no corrected one."""
    trains = [features(30, 3, 1), features(30, 3, 2, weights="v")]
    queries = [features(4, 2, 3, prefix="q"), features(4, 2, 4, weights="v", prefix="q")]
    trains[1], queries[1] = (replace(f[1], values=1000 * f[1].values) for f in (trains, queries))
    found = influence(trains, queries, etas=[0.2, 0.3], curvature="fisher", damping=1e-2)
    parts = [
        influence(t, q, etas=eta, curvature="fisher", damping=1e-2)
        for t, q, eta in zip(trains, queries, (0.2, 0.3), strict=True)
    ]
    torch.testing.assert_close(found.sdi, parts[0].sdi + parts[1].sdi)
    plain = [influence(t, q).energies for t, q in zip(trains, queries, strict=True)]
    assert (plain[1] / plain[0] > 1e5).all()
    assert (parts[1].energies / parts[0].energies < 100).all()
    torch.testing.assert_close(parts[0].energies[0], parts[0].sdi.abs().sum((0, 2)))
    torch.testing.assert_close(parts[0].shares, torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["train", "both"])
def test_unit_norms(normalize: Any) -> None:
    train, query = features(20, 3, 1), features(4, 2, 2, prefix="q")
    norms = [f.summed().values.norm(dim=1) for f in (train, query)]
    g = train.values / norms[0][:, None, None]
    q = query.values / norms[1][:, None, None] if normalize == "both" else query.values
    plain = influence(train, query, normalize=normalize)
    torch.testing.assert_close(plain.sdi, torch.einsum("nsd,qtd->nqt", g, q))
    inverse = dense(replace(train, values=g), 1e-2)
    found = influence(train, query, normalize=normalize, curvature="fisher", damping=1e-2)
    torch.testing.assert_close(found.sdi, torch.einsum("nsd,qtd->nqt", g, q @ inverse))
    zero = replace(train, values=train.values.index_fill(0, torch.tensor([3]), 0))
    assert not unit_norm(zero).values[3].any()


def test_streamed_leading_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all eigenvectors are too many: all of them again at full rank, and the others' mean below it."""
    train = features(300, None, 1)
    whole = Fisher.fit(train, damping=1e-3)
    monkeypatch.setattr(factors, "EXACT_SIDE", 4)
    monkeypatch.setattr("stepinfluence.attribution.curvature.rows.CHUNK_BYTES", 8 * WIDTH * 7)  # seven rows at a time
    streamed = Fisher.fit(train, damping=1e-3, rank=WIDTH)
    torch.testing.assert_close(streamed.factors[0].values, whole.factors[0].values)
    asked = features(5, 2, 3, prefix="q").values
    torch.testing.assert_close(streamed.solve(asked), whole.solve(asked), rtol=1e-8, atol=1e-8)
    low = Fisher.fit(train, damping=1e-3, rank=5).factors[0]
    torch.testing.assert_close(low.values, whole.factors[0].values[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(low.rest, float(whole.factors[0].values[5:].mean()), rtol=1e-6, atol=0)
    torch.testing.assert_close(low.basis @ low.basis.T, torch.eye(5, dtype=torch.float64))
    blocks = BlockFisher.fit(train, damping=1e-3, rank=9)
    torch.testing.assert_close(blocks.solve(asked), asked @ dense(train, 1e-3, PARTS), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [8, 60])
def test_low_rank_keeps_the_sum_of_eigenvalues(rows: int) -> None:
    train = features(rows, None, 1)
    exact = Fisher.fit(train, damping=1e-3)
    low = Fisher.fit(train, damping=1e-3, rank=3).factors[0]
    others = len(exact.factors[0].values) - 3
    torch.testing.assert_close(float(low.values.sum()) + others * low.rest, float(exact.factors[0].values.sum()))


# --------------------------------------------------------------------------------------------------------------------
# Damping


def test_auto_is_cross_validation() -> None:
    """V written out with dense matrices, on losses that the features explain up to noise."""
    train = features(50, 2, 1)
    grads = train.summed().values
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    losses = grads @ truth + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64)
    train = replace(train, losses=losses)
    found = Fisher.fit(train)
    y = losses - losses.mean()
    expected = []
    for damping in auto.GRID:
        hat = grads @ dense(train, damping) @ grads.T / 50
        left = 1 - 1.4 * float(hat.trace()) / 50
        expected.append(float((y - hat @ y).square().mean()) / left**2 if left > 0 else float("inf"))
    torch.testing.assert_close(found.errors, tuple(expected), rtol=1e-7, atol=0)
    place = auto.GRID.index(found.damping)
    assert found.damping == found.auto
    assert expected[place] < expected[min(place + 1, len(expected) - 1)] or place == len(expected) - 1
    assert found.with_damping(1e-3).with_damping("auto").damping == found.damping
    # Noise alone asks for much damping; losses that features explain, for little.
    noise = replace(train, losses=torch.randn(50, generator=generator, dtype=torch.float64))
    clean = replace(train, losses=grads @ truth)
    assert Fisher.fit(noise).damping > 10 * Fisher.fit(clean).damping


def test_auto_takes_the_first_minimum_from_above() -> None:
    assert auto.first_minimum([0.1, 0.5, 0.3, 0.4, 0.9]) == 2
    assert auto.first_minimum([0.1, 0.2, 0.3]) == 0
    assert auto.first_minimum([0.3, 0.2, 0.1]) == 2


def test_blocks_take_the_median_of_their_choices() -> None:
    train = features(40, 2, 1)
    chosen = BlockFisher.fit(train).damping
    each = []
    for cut, block in zip(PARTS, BLOCKS, strict=True):
        space = FeatureSpace("sketch", (replace(block, start=0, stop=cut.stop - cut.start),), "t", "w")
        each.append(Fisher.fit(replace(train, values=train.values[..., cut], space=space)).damping)
    assert chosen == max(each)


# --------------------------------------------------------------------------------------------------------------------
# On disk, and what stands out


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_kept_and_read_again(tmp_path: Path, kind: Any) -> None:
    fitted = kind.fit(features(20, 3, 1))
    save(fitted, tmp_path / "kept", of="rows")
    again = load(tmp_path / "kept", of="rows")
    assert type(again) is kind
    assert again.digest == fitted.digest
    assert (again.auto, again.errors, again.space) == (fitted.auto, fitted.errors, fitted.space)
    save(fitted.with_damping(0.5), tmp_path / "kept")
    assert load(tmp_path / "kept").damping == 0.5
    with pytest.raises(StoreError, match="fitted to other rows"):
        load(tmp_path / "kept", of="rows")
    file = tmp_path / "kept" / "fisher.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="damaged"):
        load(tmp_path / "kept")
    with pytest.raises(StoreError, match="no curvature here"):
        load(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"holds other files \(notes.txt\)"):
        save(fitted, tmp_path / "other")


def test_what_stands_out() -> None:
    trains = [features(9, 3, 1), features(9, 3, 2, weights="v")]
    trains[1] = replace(trains[1], losses=torch.tensor([0.5] * 4 + [torch.nan] + [0.25] * 4))
    expected = self_influence(trains, etas=[0.2, 0.3])
    found = outliers(trains, 20, etas=[0.2, 0.3])
    order = [k for k in expected.sum(1).argsort(descending=True).tolist() if k != 4]
    assert [one.row for one in found] == order
    assert [one.id for one in found] == [f"z{k}" for k in order]
    for one in found:
        torch.testing.assert_close(torch.from_numpy(one.steps), expected[one.row])
        torch.testing.assert_close(one.score, float(expected[one.row].sum()))
    first = outliers(trains[0].summed(), 1, by="leverage", damping=1e-2)[0]
    leverage = self_influence(trains[0].summed(), curvature="fisher", damping=1e-2)
    assert first.row == int(leverage.argmax())
    torch.testing.assert_close(first.score, float(leverage.max()))
    for wrong, message in (({"k": 0}, "k: got 0"), ({"by": "size"}, "by: got 'size'"), ({"damping": 1.0}, "by='lev")):
        with pytest.raises(ValueError, match=message):
            outliers(trains, **wrong)


# --------------------------------------------------------------------------------------------------------------------
# What cannot be answered


def test_bad_input() -> None:
    train, query = features(10, 3, 1), features(4, 2, 2, prefix="q")
    fitted = Fisher.fit(train, damping=1e-2)
    for damping in (0, -1.0, float("nan"), "much", True):
        with pytest.raises(ValueError, match="damping: got"):
            Fisher.fit(train, damping=damping)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank: got 0"):
        Fisher.fit(train, rank=0)
    with pytest.raises(TypeError, match="train: got list"):
        Fisher.fit([train])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no row has features"):
        Fisher.fit(replace(train, losses=torch.full((10,), torch.nan)))
    with pytest.raises(ValueError, match="all features are zero"):
        Fisher.fit(replace(train, values=torch.zeros_like(train.values)))
    with pytest.raises(ValueError, match="values that are not finite"):
        Fisher.fit(replace(train, values=train.values / 0))
    with pytest.raises(ValueError, match="query: features with values that are not finite"):
        fitted.transform(replace(query, values=query.values / 0))
    with pytest.raises(ValueError, match="all the same; give a number"):
        Fisher.fit(replace(train, losses=torch.ones(10)))
    with pytest.raises(FeatureMismatchError, match="query: features computed at other weights"):
        fitted.transform(features(4, 2, 2, weights="v"))
    with pytest.raises(FeatureMismatchError, match="transformed already"):
        fitted.transform(fitted.transform(query))
    with pytest.raises(FeatureMismatchError, match=r"train: .*transformed"):
        Fisher.fit(fitted.transform(train))
    with pytest.raises(FeatureMismatchError, match="train: features were multiplied by a curvature"):
        influence(fitted.transform(train), query)
    with pytest.raises(FeatureMismatchError, match="values: got 3 columns"):
        fitted.solve(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'auto' was not chosen"):
        fitted.with_damping("auto")
    shared = replace(
        train, space=FeatureSpace("sketch", tuple(replace(b, start=0, stop=WIDTH) for b in BLOCKS), "t", "w")
    )
    with pytest.raises(ValueError, match="sum layout"):
        BlockFisher.fit(shared)
    for wrong, message in (
        ({"curvature": "hessian"}, "curvature: got 'hessian'"),
        ({"curvature": [fitted, fitted]}, "curvature: got 2 for 1 checkpoints"),
        ({"curvature": fitted, "damping": 0.1}, "fitted already"),
        ({"curvature": fitted, "normalize": "train"}, "normalize: goes with"),
        ({"damping": 0.1}, "damping: goes with curvature"),
        ({"normalize": "query"}, "normalize: got 'query'"),
    ):
        with pytest.raises(ValueError, match=message):
            influence(train, query, **wrong)


def test_failed_rows_are_left_out_and_zero_parameters_too() -> None:
    train, query = features(10, 3, 1), features(4, 2, 2, prefix="q")
    losses = train.losses.clone()
    losses[[2, 7]] = torch.nan
    kept = [k for k in range(10) if k not in (2, 7)]
    some = Fisher.fit(replace(train, losses=losses), damping=1e-2)
    torch.testing.assert_close(
        some.solve(query.values), Fisher.fit(train.select(kept), damping=1e-2).solve(query.values)
    )
    silent = train.values.clone()
    silent[..., 9:] = 0
    solved = BlockFisher.fit(replace(train, values=silent)).solve(query.values)
    assert not solved[..., 9:].any()
    assert solved[..., :9].any()


def test_public_names() -> None:
    assert stepinfluence.curvature.Fisher is stepinfluence.Fisher is fisher.Fisher


def test_curvature_holds_back_an_example_with_a_large_gradient() -> None:
    """It fills a query's plain scores; where the damping is small beside its eigenvalue, hardly any corrected ones."""
    train, query = features(60, 3), features(4, 3, 1, prefix="q")
    train.values[7] *= 1000
    plain, corrected = (
        influence(train, query, **options).sdi.abs().sum((1, 2))  # type: ignore[arg-type]
        for options in ({}, {"curvature": "fisher", "damping": 1e-4})
    )
    assert float(plain[7] / plain.sum()) > 0.9
    assert float(corrected[7] / corrected.sum()) < 0.1
