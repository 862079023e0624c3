"""Energies by checkpoint: those of the whole table of scores, one checkpoint at a time."""

from __future__ import annotations

from pathlib import Path

import made
import numpy as np
import pytest
from stepinfluence import influence
from stepinfluence.search import checkpoint_energy, energy


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
    want = [influence([sides[0][k]], [sides[1][k]], etas=etas[k]).energy().sum(1).numpy() for k in range(2)]
    np.testing.assert_allclose(checkpoint_energy(train, query), want, rtol=1e-5)
    part = checkpoint_energy(train, query, parameters="norm.gain")
    assert (part < checkpoint_energy(train, query)).all()


def test_rows_that_failed_are_left_out_and_many_are_sampled(tmp_path: Path) -> None:
    values, asked = made.normal(40, made.WIDTH), made.features(made.normal(3, 2, made.WIDTH, seed=1), prefix="q")
    train = made.store(tmp_path / "t", [made.features(values)], failed=[2, 8])
    query = made.store(tmp_path / "q", [asked], failed=[1])
    kept = [r for r in range(40) if r not in (2, 8)]
    want = influence(made.features(values[kept]), asked).energy().sum(1).numpy()
    found = checkpoint_energy(train, query)
    np.testing.assert_allclose(found[0, [0, 2]], want[[0, 2]], rtol=1e-5)
    assert np.isnan(found[0, 1])
    spread = [kept[i] for i in (0, 12, 25, 37)]
    want = influence(made.features(values[spread]), asked).energy().sum(1).numpy()
    np.testing.assert_allclose(checkpoint_energy(train, query, most_rows=4)[0, [0, 2]], want[[0, 2]], rtol=1e-5)
    with pytest.raises(ValueError, match="most_rows: got 0"):
        checkpoint_energy(train, query, most_rows=0)
