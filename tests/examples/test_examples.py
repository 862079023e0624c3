"""Every example runs, and finds what it says it finds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ELSEWHERE = {"sharded_gpt": "tests/stepinfluence/app/runs/test_sharded_project.py"}
"""Tests of examples that need several processes."""


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [p.stem for p in EXAMPLES.glob("*.py")]:
        sys.modules.pop(name, None)


def run(name: str) -> object:
    return importlib.import_module(name).main()


def test_influence_horizon() -> None:
    assert 1 <= run("influence_horizon") <= 12  # type: ignore[operator]


def test_signal_cancellation() -> None:
    found = run("signal_cancellation")
    assert (found >= 0).all()  # type: ignore[operator]
    assert (found <= 1).all()  # type: ignore[operator]
    assert found[0] > 0.3  # type: ignore[index]


def test_depth_targeted_selection() -> None:
    found = run("depth_targeted_selection")
    assert {"before", "random", "TracIn", "late steps"} <= set(found)  # type: ignore[call-overload]
    chosen, drawn = found["all steps, normalised"], found["random"]  # type: ignore[index]
    assert chosen["of the kind"] > drawn["of the kind"]
    assert chosen["loss"] < drawn["loss"]


def test_mislabel_triage() -> None:
    assert run("mislabel_triage") > 0.7  # type: ignore[operator]


def test_preference_pairs() -> None:
    means = run("preference_pairs")
    assert means["same"] > 0 > means["reversed"]  # type: ignore[index]
    assert means["same"] > abs(means["other"])  # type: ignore[index]


def test_reward_weighted() -> None:
    good, _ = run("reward_weighted")  # type: ignore[misc]
    assert good > 0


def test_token_attribution_adds_up() -> None:
    torch.set_default_dtype(torch.float64)
    by_token, whole = run("token_attribution")  # type: ignore[misc]
    torch.testing.assert_close(by_token.sum(0), whole)


def test_every_example_is_tested_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("[!_]*.py"):
        assert f"`{path.name}`" in listed, path.name
        if path.stem in ELSEWHERE:
            assert f'"{path.name}"' in (EXAMPLES.parent / ELSEWHERE[path.stem]).read_text(), path.name
        else:
            assert f'run("{path.stem}")' in here, path.name
