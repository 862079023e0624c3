"""Sketch sizes by gradient energy."""

from __future__ import annotations

import itertools

import pytest
import torch
from stepinfluence import Features, FeatureSpace, allocate_sizes, gradient_energies
from stepinfluence.attribution.space import Block


def features(energies: dict[str, float], shapes: dict[str, tuple[int, ...]] | None = None) -> Features:
    """Two examples; each parameter has four columns and the energy given."""
    shapes = shapes or dict.fromkeys(energies, (64, 64))
    names = list(energies)
    blocks = tuple(Block(n, shapes[n], 4 * k, 4 * k + 4) for k, n in enumerate(names))
    values = torch.tensor([energies[n] for n in names]).sqrt().repeat_interleave(4).expand(2, -1) / 2
    n = torch.zeros(2)
    return Features(values, n, n.long(), None, (0, 1), FeatureSpace("exact", blocks, "", ""))


def test_energies_are_mean_squared_norms() -> None:
    made = features({"a": 4.0, "b": 0.25})
    assert gradient_energies(made) == pytest.approx({"a": 4.0, "b": 0.25})


def test_equal_energies_get_equal_sizes() -> None:
    assert allocate_sizes(features({"a": 1.0, "b": 1.0}), width=256) == {"a": 128, "b": 128}


def test_best_of_all_allocations_by_powers_of_two() -> None:
    """Against every allocation there is."""
    energies = {"a": 8.0, "b": 2.0, "c": 1.0, "d": 0.1}
    sizes = allocate_sizes(features(energies), width=512, smallest=16)

    def variance(given: tuple[int, ...]) -> float:
        return sum(e**2 / m for e, m in zip(energies.values(), given, strict=True))

    possible = (c for c in itertools.product([16, 32, 64, 128, 256, 512], repeat=4) if sum(c) <= 512)
    best = min(variance(c) for c in possible)
    assert sum(sizes.values()) <= 512
    assert variance(tuple(sizes.values())) == pytest.approx(best)


def test_any_size_comes_close_to_proportional() -> None:
    sizes = allocate_sizes(features({"a": 8.0, "b": 2.0, "c": 1.0}), width=1100, powers_of_two=False)
    assert sum(sizes.values()) <= 1100
    best = (8.0 + 2.0 + 1.0) ** 2 / 1100  # of sum(e**2 / m), at m proportional to e
    assert sum(e**2 / sizes[n] for n, e in {"a": 8.0, "b": 2.0, "c": 1.0}.items()) < 1.02 * best


def test_energies_of_queries_count_too() -> None:
    train, query = features({"a": 1.0, "b": 1.0}), features({"a": 16.0, "b": 1.0})
    assert allocate_sizes(train, query, width=320) == {"a": 256, "b": 64}


def test_vectors_are_lossless_where_they_are_worth_it() -> None:
    shapes = {"w": (64, 64), "gain": (96,), "bias": (5,), "quiet": (4000,)}
    made = features({"w": 1.0, "gain": 0.5, "bias": 1e-6, "quiet": 1e-9}, shapes)
    assert allocate_sizes(made, width=1024) == {"w": 512, "gain": 96, "bias": 5, "quiet": 16}


def test_parameters_without_gradient_get_the_least() -> None:
    assert allocate_sizes(features({"a": 1.0, "b": 0.0}), width=10_000)["b"] == 16


def test_what_cannot_be_allocated() -> None:
    made = features({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="width: got 20; 2 parameters need at least 32 columns"):
        allocate_sizes(made, width=20)
    with pytest.raises(ValueError, match="query: features of other parameters"):
        allocate_sizes(made, features({"a": 1.0}), width=100)
    shared = FeatureSpace("sketch", (Block("a", (4,), 0, 8), Block("b", (4,), 0, 8)), "", "")
    with pytest.raises(ValueError, match="in the sum layout parameters share their columns"):
        gradient_energies(Features(made.values, made.losses, made.steps, None, (0, 1), shared))
