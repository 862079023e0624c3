"""What docs/curvature-evidence.md reads of the trial of Kronecker factors holds for what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parts_curvature as parts
import pytest
from parts_evaluation import kept
from stepinfluence.evaluation import Figure

from bench.kronecker import __main__ as command

LOST = ("adder", "majority", "language")
LENGTH, BEST, HEURISTIC, MIXED = parts.COMPARED.values()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return kept("kronecker")


def less(results: dict[str, Any], method: str, how: tuple[str | None, str | None]) -> dict[str, Figure]:
    """LDS of a method less that of the sketched Fisher, by problem."""
    return parts.differences({problem: result["lds"] for problem, result in results.items()}, method, how)


def each(results: dict[str, Any], problem: str, how: tuple[str | None, str | None]) -> Iterator[Figure]:
    """Of every Kronecker form."""
    return (less(results, method, how)[problem] for method in command.KRONECKER)


def test_with_the_same_damping_none_is_above(results: dict[str, Any]) -> None:
    for problem in results:
        assert not any(d.low > 0 for d in each(results, problem, LENGTH)), problem
    for problem in LOST:
        assert all(d.high < 0 for d in each(results, problem, LENGTH))


def test_none_is_above_where_the_fisher_matters(results: dict[str, Any]) -> None:
    for problem, how in ((p, h) for p in LOST for h in parts.COMPARED.values()):
        assert not any(d.low > 0 for d in each(results, problem, how)), problem
    assert all(d.high < 0 for d in each(results, "majority", BEST))


def test_on_trm_some_are_above(results: dict[str, Any]) -> None:
    above = [m for m in command.KRONECKER if less(results, m, HEURISTIC)["trm"].low > 0]
    assert set(command.KRONECKER) - set(above) == {"EK-FAC, gradients"}
    above = [m for m in command.KRONECKER if less(results, m, MIXED)["trm"].low > 0]
    assert above == ["EK-FAC, reduce", "K-FAC, factored, reduce steps"]
    for method, problem in ((m, p) for m in above for p in ("adder", "majority")):
        assert less(results, method, MIXED)[problem].high < 0


def test_sketches_lose_nothing_and_blocks_do(results: dict[str, Any]) -> None:
    for problem, difference in less(results, command.EXACT, LENGTH).items():
        assert abs(difference.value) < 0.02, problem
    assert less(results, command.EXACT_BLOCKS, LENGTH)["majority"].high < 0


def test_time_is_about_the_same_and_factors_are_smaller(results: dict[str, Any]) -> None:
    for problem, result in results.items():
        ours, theirs = (f"{command.SKETCHED}: {command.LENGTH}", "EK-FAC, expand")
        seconds = [sum(result["seconds"][name].values()) for name in (ours, theirs)]
        assert seconds[1] > seconds[0], problem
        assert 12 * result["numbers"][theirs]["curvature"] < result["numbers"][ours]["curvature"], problem
