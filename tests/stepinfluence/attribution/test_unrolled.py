"""SOURCE by query step: against matrix exponentials, exact unrolling of gradient descent, and its two limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from stepinfluence import BlockFisher, Features, FeatureSpace, Fisher, influence
from stepinfluence.attribution.curvature import Segment, Unrolled
from stepinfluence.attribution.curvature.factors import of_gram
from stepinfluence.attribution.space import Block
from stepinfluence.errors import FeatureMismatchError
from stepinfluence.search import top_k
from torch import Tensor

WIDTH = 6
BLOCKS = (Block("a", (2, 2), 0, 4), Block("b", (2,), 4, 6))
SEGMENTS = (Segment((0, 1), 0.3, 5), Segment((2,), 0.1, 4), Segment((3,), 0.05, 20))


def features(rows: int, steps: int | None, seed: int, *, weights: str = "w", values: Tensor | None = None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, WIDTH) if steps is None else (rows, steps, WIDTH)
    scale = torch.logspace(0.5, -1.5, WIDTH, dtype=torch.float64)
    return Features(
        values=torch.randn(shape, generator=generator, dtype=torch.float64) * scale if values is None else values,
        losses=torch.rand(rows, generator=generator),
        steps=torch.full((rows,), steps or 1),
        lengths=None,
        ids=tuple(f"z{k}" for k in range(rows)),
        space=FeatureSpace("sketch", BLOCKS, "t", weights),
    )


def checkpoints(count: int = 4, rows: int = 9) -> list[Features]:
    return [features(rows, 2, k, weights=f"w{k}") for k in range(count)]


def dense(train: Sequence[Features], query: Features, segments: Sequence[Segment], cuts: Sequence[slice]) -> Tensor:
    """``(n, q, steps)``: SOURCE with matrices and their exponentials."""
    eye, kept = torch.eye(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64)
    total = torch.zeros(len(train[0]), len(query), query.values.shape[1], dtype=torch.float64)
    for segment in reversed(segments):
        time = segment.learning_rate * segment.updates
        rows = torch.cat([train[k].summed().values for k in segment.checkpoints])
        gram = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for cut in cuts:
            gram[cut, cut] = rows[:, cut].T @ rows[:, cut] / len(rows)
        mean = torch.stack([train[k].summed().values for k in segment.checkpoints]).mean(0)
        # dense inverses: there are more rows than columns
        gathered = (eye - torch.matrix_exp(-time * gram)) @ torch.linalg.inv(gram)
        total += torch.einsum("nd,de,ef,qtf->nqt", mean, gathered, kept, query.values)
        kept = torch.matrix_exp(-time * gram) @ kept
    return total


@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_equals_matrix_exponentials_and_conserves(kind: Any) -> None:
    train, query = checkpoints(), features(3, 4, 9, weights="w3")
    unrolled = Unrolled.fit(train, SEGMENTS, curvature=kind.kind)
    found = influence(train, unrolled.transform(query))
    expected = dense(train, query, SEGMENTS, kind.ranges(query.space))
    torch.testing.assert_close(found.sdi, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    whole = influence(train, unrolled.transform(query.summed()), decompose="train")
    assert float((found.tracin - whole.tracin).abs().max()) <= 1e-6 * float(whole.tracin.abs().max())
    both = influence(train, unrolled.transform(query), decompose="both")
    torch.testing.assert_close(both.sdi.sum(2), found.sdi, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_conserves_in_float32() -> None:
    train = [replace(f, values=f.values.float()) for f in checkpoints()]
    query = features(3, 4, 9, weights="w3")
    query = replace(query, values=query.values.float())
    unrolled = Unrolled.fit(train, SEGMENTS)
    found = influence(train, unrolled.transform(query))
    whole = influence(train, unrolled.transform(query.summed()), decompose="train")
    assert float((found.tracin - whole.tracin).abs().max()) <= 1e-6 * float(found.sdi.abs().sum(2).max())


def test_a_short_training_is_tracin_and_a_long_one_the_influence_function() -> None:
    train, query = checkpoints(2), features(3, 4, 9, weights="w1")
    short = [Segment((k,), rate, 3) for k, rate in enumerate((1e-9, 4e-9))]
    found = influence(train, Unrolled.fit(train, short).transform(query))
    again = [replace(query, space=features.space) for features in train]
    plain = influence(train, again, etas=[3e-9, 12e-9]).sdi
    torch.testing.assert_close(found.sdi, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
    long = [Segment((0,), 0.5, 7), Segment((1,), 1.0, 10**7)]
    found = influence(train, Unrolled.fit(train, long).transform(query))
    grads = train[1].summed().values
    expected = torch.einsum("nd,qtd->nqt", grads @ torch.linalg.inv(grads.T @ grads / len(grads)), query.values)
    torch.testing.assert_close(found.sdi, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_where_no_gradient_reaches_nothing_is_forgotten() -> None:
    """Directions without curvature: a plain sum of ``eta K`` times the gradients, as R has no pole."""
    train, query = [features(3, None, k, weights=f"w{k}") for k in range(2)], features(2, 3, 9, weights="w1")
    train = [replace(f, values=f.values.index_fill(1, torch.tensor([1, 4]), 0)) for f in train]
    found = Unrolled.fit(train, [Segment((0,), 0.5, 4), Segment((1,), 0.1, 30)]).transform(query)
    for one, time in zip(found, (2.0, 3.0), strict=True):
        torch.testing.assert_close(one.values[..., [1, 4]], time * query.values[..., [1, 4]])


def test_a_low_rank_has_the_mean_of_the_other_eigenvalues() -> None:
    train, query = checkpoints(1), features(3, 4, 9, weights="w0")
    unrolled = Unrolled.fit(train, [Segment((0,), 0.3, 5)], rank=2)
    factor = unrolled.factors[0][0]
    inside = factor.basis.T @ factor.basis
    gram = factor.basis.T @ torch.diag(factor.values) @ factor.basis + factor.rest * (torch.eye(WIDTH) - inside)
    gathered = (torch.eye(WIDTH) - torch.matrix_exp(-1.5 * gram)) @ torch.linalg.inv(gram)
    assert len(factor.values) == 2
    assert factor.rest > 0
    torch.testing.assert_close(unrolled.transform(query)[0].values, query.values @ gathered)


def unrolled_exactly(x: Tensor, y: Tensor, rate: float, updates: int) -> tuple[list[Tensor], Tensor]:
    """Gradient descent on ``mean_z (x_z w - y_z)^2 / 2``: the weights before each update, and the derivative of the
    last ones by each example's weight in the loss ``(n, D)``, by autograd through all of training."""
    share = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    w, seen = torch.zeros(x.shape[1], dtype=torch.float64), []
    for _ in range(updates):
        seen.append(w.detach())
        w = w - rate * ((share * (x @ w - y)) @ x) / len(x)
    return seen, torch.stack([torch.autograd.grad(one, share, retain_graph=True)[0] for one in w], 1)


def test_is_the_exact_unrolling_of_a_quadratic_trained_by_small_steps() -> None:
    """With the Hessian itself, and a segment for each update, the exponential is all that differs from gradient
    descent: of first order in the learning rate, so halving it halves the difference, and extrapolating takes it away.
    """
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, WIDTH), (8,)))
    phi = torch.randn((2, 3, WIDTH), generator=generator, dtype=torch.float64)  # by step: any split of a gradient
    exact, found = [], []
    for halved in range(3):
        updates, rate = 40 << halved, 0.04 / (1 << halved)
        seen, change = unrolled_exactly(x, y, rate, updates)
        train = [features(8, None, 0, weights=f"w{k}", values=(x @ w - y)[:, None] * x) for k, w in enumerate(seen)]
        unrolled = Unrolled.fit(train, [Segment((k,), rate, 1) for k in range(updates)])
        hessian = of_gram(x.T @ x / 8)
        unrolled = replace(unrolled, factors=((hessian,),) * updates)
        query = features(2, 3, 9, weights=f"w{updates - 1}", values=phi)
        found.append(influence(train, unrolled.transform(query)).sdi)
        exact.append(-8 * torch.einsum("nd,qtd->nqt", change, phi))
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    assert errors[0] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2
    gaps = [a - b for a, b in zip(found, exact, strict=True)]
    extrapolated = (8 * gaps[2] - 6 * gaps[1] + gaps[0]) / 3
    assert float(extrapolated.abs().max() / exact[2].abs().max()) < 1e-4


def test_few_segments_are_exact_where_gradients_and_curvature_stand_still() -> None:
    """Losses linear in the weights beside a shared quadratic: one segment for any number of updates."""
    generator = torch.Generator().manual_seed(5)
    pulls = torch.randn((5, WIDTH), generator=generator, dtype=torch.float64)
    root = torch.randn((WIDTH, WIDTH), generator=generator, dtype=torch.float64)
    hessian, rates, updates = root @ root.T / WIDTH, (2e-5, 1e-5), (30_000, 50_000)
    train = [features(5, None, 0, weights=f"w{k}", values=pulls) for k in range(2)]
    unrolled = Unrolled.fit(train, [Segment((k,), rates[k], updates[k]) for k in range(2)])
    unrolled = replace(unrolled, factors=((of_gram(hessian),),) * 2)
    phi = features(2, 3, 9, weights="w1")
    # The recursion d <- (1 - eta H) d + eta b, closed in the eigenvectors.
    values, vectors = torch.linalg.eigh(hessian)
    change = torch.zeros_like(pulls)
    for rate, count in zip(rates, updates, strict=True):
        kept = (1 - rate * values) ** count
        change = change * kept + (pulls @ vectors) * (1 - kept) / values
    expected = torch.einsum("nd,qtd->nqt", change @ vectors.T, phi.values)
    found = influence(train, unrolled.transform(phi)).sdi
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_stores_and_searches_take_it(tmp_path: Path) -> None:
    given = [made.features(made.normal(30, made.WIDTH, seed=k), prefix="z", weights=f"w{k}") for k in range(3)]
    query = made.features(made.normal(4, 3, made.WIDTH, seed=9), prefix="q", weights="w2")
    store = made.store(tmp_path / "t", given, etas=(1.0, 1.0, 1.0), dtype="fp32", failed=())
    segments = [Segment((0, 1), 1e-3, 7), Segment((2,), 2e-3, 9)]
    asked = Unrolled.fit(store, segments).transform(query)
    expected = influence(given, Unrolled.fit(given, segments).transform(query)).tracin
    found = top_k(store, asked, 5)
    torch.testing.assert_close(found.scores, expected.topk(5, dim=0).values.T, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_unrolled() -> None:
    train, query = checkpoints(2), features(3, 4, 9, weights="w1")
    segments = [Segment((0,), 0.1, 2), Segment((1,), 0.1, 2)]
    for wrong in ([segments[0]], segments[::-1], [*segments, segments[1]]):
        with pytest.raises(ValueError, match=r"segments: got checkpoints .* of 2"):
            Unrolled.fit(train, wrong)
    for wrong_segment in ({"checkpoints": ()}, {"learning_rate": 0.0}, {"updates": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong_segment))):
            Segment(**{"checkpoints": (0,), "learning_rate": 0.1, "updates": 1, **wrong_segment})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curvature: "):
        Unrolled.fit(train, segments, curvature="hessian")  # type: ignore[arg-type]
    adam = [replace(f, space=replace(f.space, metric=f"m{k}")) for k, f in enumerate(train)]
    with pytest.raises(FeatureMismatchError, match="under different metrics"):
        Unrolled.fit(adam, segments)
    with pytest.raises(FeatureMismatchError, match="other parameters or sketches"):
        Unrolled.fit([train[0], replace(train[1], space=replace(train[1].space, tables="u"))], segments)
    unrolled = Unrolled.fit(train, segments)
    with pytest.raises(FeatureMismatchError, match="weights of checkpoint 0"):
        unrolled.transform(replace(query, space=train[0].space))
    with pytest.raises(FeatureMismatchError, match="transformed already"):
        unrolled.transform(unrolled.transform(query)[1])
    with pytest.raises(FeatureMismatchError, match="query: features under another metric"):
        unrolled.transform(replace(query, space=adam[1].space))
    with pytest.raises(ValueError, match="not finite"):
        unrolled.transform(replace(query, values=query.values / 0))


def test_one_metric_for_all_is_the_optimizers_training() -> None:
    """With features ``sqrt(P) g`` of a fixed P: the influence of training by ``w <- w - eta P g``."""
    generator = torch.Generator().manual_seed(7)
    root = torch.rand(WIDTH, generator=generator, dtype=torch.float64) + 0.5
    train, query = checkpoints(2), features(3, 4, 9, weights="w1")
    segments = [Segment((0,), 0.3, 2), Segment((1,), 0.1, 5)]

    def under(f: Features) -> Features:
        return replace(f, values=f.values * root, space=replace(f.space, metric="P"))

    trained = [under(f) for f in train]
    found = influence(trained, Unrolled.fit(trained, segments).transform(under(query)))
    # Written out in the weights, with the matrix P H, which is not symmetric.
    carried, expected = query.values, torch.zeros_like(found.sdi)
    metric = torch.diag(root.square())
    for segment, f in zip(segments[::-1], train[::-1], strict=True):
        gram = f.summed().values.T @ f.summed().values / len(f)
        kept = torch.matrix_exp(-segment.learning_rate * segment.updates * metric @ gram)
        eye = torch.eye(WIDTH, dtype=torch.float64)
        pulled = (eye - kept) @ torch.linalg.inv(metric @ gram) @ metric
        expected += torch.einsum("nd,qtf,fd->nqt", f.summed().values, carried, pulled)
        carried = carried @ kept
    torch.testing.assert_close(found.sdi, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
