"""A short soak: nothing is left over after featurizing, storing and searching again and again."""

from __future__ import annotations

import pytest

from bench.soak import growth, soak


def test_rounds_leave_nothing_behind() -> None:
    measured, before, after = soak(0, least_rounds=6)
    assert len(measured) == 6
    assert after == before
    assert after.hooks == 0


@pytest.mark.parametrize(("leak", "grown"), [(0, 0), (2**20, 60)])
def test_growth_is_seen(leak: int, grown: float) -> None:
    measured = [(float(t), 10**8 + t * leak) for t in range(100)]
    assert growth(measured) == pytest.approx(grown, rel=0.2)
