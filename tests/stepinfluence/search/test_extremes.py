"""Scores that float32 cannot hold: refused, or told of where only some queries have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from accuracy import inner_products
from stepinfluence import influence, self_influence
from stepinfluence.attribution.features import Features
from stepinfluence.search import scores, top_k
from torch import Tensor

BY_STEP = 3
SMALL, LARGE = "scores: all are too small for float32", "scores: some are too large for float32"


def pair(train: float | Tensor, query: float | Tensor) -> tuple[Features, Features]:
    """Features of nine rows and three queries of two steps, times these."""
    return (
        made.features(made.normal(9, made.WIDTH) * train),
        made.features(made.normal(3, 2, made.WIDTH, seed=1) * query, prefix="q"),
    )


def ways(path: Path) -> list[Callable[..., Any]]:
    """Every way of scoring all rows: from memory, and from stores of each dtype."""

    def stored(dtype: str) -> Callable[..., Any]:
        def run(train: Features, query: Features, **options: Any) -> Any:
            folder = path / f"{dtype}-{len(list(path.iterdir()))}"
            sides = [made.store(folder / n, [f], dtype=dtype, shard_rows=4) for n, f in (("t", train), ("q", query))]
            return scores(*sides, progress=False, **options)

        return run

    return [  # BY_STEP is the place of the one that ranks by each step
        influence,
        lambda *a, **k: scores(*a, progress=False, **k),
        lambda *a, **k: top_k(*a, 3, progress=False, **k),
        lambda *a, **k: top_k(*a, 3, progress=False, per_step=True, **k),
        *map(stored, ("fp32", "fp16", "bf16", "int8")),
    ]


@pytest.mark.parametrize("sizes", [(1e-30, 1e-30), (1e-20, 1e-21), (1e-40, 1.0)])
def test_all_too_small_is_refused(sizes: tuple[float, float], tmp_path: Path) -> None:
    for way in ways(tmp_path):
        with pytest.raises(ValueError, match=SMALL):
            way(*pair(*sizes))


def test_etas_count(tmp_path: Path) -> None:
    """Weights so small that nothing is left, though the features are of ordinary size; a weight of 0 is meant."""
    for way in ways(tmp_path)[:4]:
        with pytest.raises(ValueError, match=SMALL):
            way(*pair(1.0, 1.0), etas=1e-43)
        way(*pair(1.0, 1.0), etas=0.0)
        way(*pair(1e-15, 1e-15), etas=1e-7)


def test_some_queries_are_told_of(tmp_path: Path) -> None:
    train, query = pair(1e-10, torch.tensor([1.0, 1e-35, 1e-10]).view(3, 1, 1))
    for way in ways(tmp_path)[:3]:
        with pytest.warns(UserWarning, match=r"those of 1 of 3 queries \(such as 'q1'\) are too small for float32"):
            found = way(train, query)
        if hasattr(found, "tracin"):
            good = [0, 2]
            expected = inner_products("nd,qtd->nqt", train.values, query.values[good])
            expected.check(found.sdi[:, good])


def test_steps_that_vanish(tmp_path: Path) -> None:
    """Told of only where rows are ranked by a step for itself."""
    train, query = pair(1.0, torch.tensor([1.0, 1e-39]).view(2, 1))
    for number, way in enumerate(ways(tmp_path)):
        if number == BY_STEP:
            with pytest.warns(UserWarning, match=r"those of 3 of 6 steps of queries \(such as 'q0'\)"):
                way(train, query)
        else:
            way(train, query)


def test_what_is_zero_may_be_zero(tmp_path: Path) -> None:
    """Examples without a gradient, and rows and queries that have no entry in common, have scores of 0."""
    ordinary = pair(1.0, 1.0)
    apart = torch.zeros(made.WIDTH)
    apart[:5] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ways(tmp_path):
            way(ordinary[0], pair(1.0, torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1))[1])
            way(*pair(0.0, 1.0))
            way(*pair(1.0, 0.0))
            way(*pair(apart, 1 - apart))
            way(*pair(torch.tensor([1.0] + 8 * [1e-38]).view(9, 1), 1.0))  # one row is enough

    def lone(a: float) -> Tensor:
        return self_influence(made.features(made.normal(2, made.WIDTH) * torch.tensor([[1.0], [a]])))

    assert bool((lone(1e-30) >= 0).all())


def test_self_influence() -> None:
    for steps in ((), (2,)):
        one = made.normal(4, *steps, made.WIDTH)
        with pytest.raises(ValueError, match=SMALL):
            self_influence(made.features(one * 1e-25))
        with pytest.raises(ValueError, match=LARGE):
            self_influence(made.features(one * 1e25))
        self_influence(made.features(one * 0))


def test_too_large_is_refused(tmp_path: Path) -> None:
    for way in ways(tmp_path):
        with pytest.raises(ValueError, match=LARGE):
            way(*pair(1e30, 1e30))
