"""Energies by checkpoint: those of the whole table of scores, one checkpoint at a time."""

from __future__ import annotations

from pathlib import Path

import made
import numpy as np
import pytest
import torch
from accuracy import Expected, multilinear
from stepinfluence.search import checkpoint_energy, energy
from torch import Tensor

pytestmark = pytest.mark.numeric


def expected(left: Tensor, right: Tensor, eta: float = 1.0) -> Expected:
    """Of the energy of each query: absolute influence by step, ``left (n, s, d)``, ``right (q, t, d)``."""

    def energy(x: Tensor, y: Tensor) -> Tensor:
        return eta * torch.einsum("nsd,qtd->nqt", x, y).abs().sum((0, 2))

    return multilinear(energy, left, right, rows=False)


@pytest.mark.parametrize("train_steps", [None, 3])
def test_equals_the_sum_of_absolute_influence(
    tmp_path: Path, train_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "ENERGY_BYTES", 4 * 13 * 7)  # a few rows at a time
    shape = (45, made.WIDTH) if train_steps is None else (45, train_steps, made.WIDTH)
    sides = [
        [made.features(made.normal(*s, seed=k), prefix=p, weights=f"w{k}") for k in range(2)]
        for p, s in (("z", shape), ("q", (4, 3, made.WIDTH)))
    ]
    etas = (0.3, 70.0)
    train, query = (made.store(tmp_path / str(k), side, etas=etas) for k, side in enumerate(sides))
    found = torch.tensor(checkpoint_energy(train, query))
    for k, eta in enumerate(etas):
        left, right = (side[k].values for side in sides)
        expected(left if train_steps else left[:, None], right, eta).check(found[k], k)
    part = checkpoint_energy(train, query, parameters="norm.gain")
    assert (part < checkpoint_energy(train, query)).all()


def test_rows_that_failed_are_left_out_and_many_are_sampled(tmp_path: Path) -> None:
    values, asked = made.normal(40, made.WIDTH), made.features(made.normal(3, 2, made.WIDTH, seed=1), prefix="q")
    train = made.store(tmp_path / "t", [made.features(values)], failed=[2, 8])
    query = made.store(tmp_path / "q", [asked], failed=[1])
    kept = [r for r in range(40) if r not in (2, 8)]
    found = checkpoint_energy(train, query)
    expected(values[kept, None], asked.values[[0, 2]]).check(torch.tensor(found[0, [0, 2]]))
    assert np.isnan(found[0, 1])
    spread = [kept[i] for i in (0, 12, 25, 37)]
    found = checkpoint_energy(train, query, most_rows=4)
    expected(values[spread, None], asked.values[[0, 2]]).check(torch.tensor(found[0, [0, 2]]))
    with pytest.raises(ValueError, match="most_rows: got 0"):
        checkpoint_energy(train, query, most_rows=0)
