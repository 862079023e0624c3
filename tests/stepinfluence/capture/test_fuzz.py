"""The generator of random looped models (bench/fuzz): a few of its models, and whether it would notice a mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz import check
from bench.fuzz.build import build, loss_fn
from bench.fuzz.generate import BACKS, HOWS, LOOPS, draw
from bench.fuzz.oracle import Oracle
from bench.fuzz.shrink import shrink
from bench.fuzz.spec import KINDS, Batch, Spec, load, walk

ROOT = Path(__file__).resolve().parents[3]

OPEN: tuple[str, ...] = ()
"""What gives wrong numbers. Take out what was mended: then its models are drawn, and those found must be right."""

FOUND = json.loads((ROOT / "bench" / "results" / "fuzz-before.json").read_text(encoding="utf-8"))["minimal"]
"""The smallest wrong model of each kind, from the commit before any was mended."""


def a_spec(*body: dict[str, object]) -> Spec:
    batches = [Batch([3, 2], 3, seed=1), Batch([2, 2, 1], 2, seed=2)]
    return Spec(seed=3, d=4, heads=2, steps=2, body=list(body), batches=batches)


LINEAR = {"op": "linear", "how": "module", "mode": "res"}


def hold(spec: Spec) -> None:
    found = check.judge(spec)
    wrong = {capture: outcome for capture, outcome in found.items() if outcome.bad}
    assert not wrong, f"{wrong}; see it again: python -m bench.fuzz --replay '{spec.dump()}'"


@pytest.mark.parametrize("seed", range(30))
def test_no_number_is_wrong(seed: int) -> None:
    hold(draw(Random(seed), without=OPEN))


@pytest.mark.parametrize("around", ["none", "reorder", "unpad"])
@pytest.mark.parametrize("how", ["grad", "grad in hook"])
def test_a_hook_that_takes_gradients_of_a_checkpointed_step_is_right(how: str, around: str) -> None:
    """The gradient taken in the hook runs the step again, which must save what it saved before."""
    hooked: dict[str, object] = {"op": "hook", "how": how}
    wrapped: dict[str, dict[str, object]] = {
        "none": hooked,
        "reorder": {"op": "reorder", "how": "gather", "back": "narrow", "order": "flip", "inner": [hooked]},
        "unpad": {"op": "unpad", "how": "rows", "back": "unbind", "inner": [hooked]},
    }
    found = check.judge(replace(a_spec(LINEAR, wrapped[around]), loop="checkpointed"))
    assert {name: outcome.verdict for name, outcome in found.items()} == {
        "sketched": "right", "inline": "refused", "exact": "right"
    }, found  # fmt: skip


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_no_number_is_wrong_by_hypothesis(random: Random) -> None:
    hold(draw(random, without=OPEN))


def is_open(model: dict[str, str]) -> bool:
    spec = load(model["spec"])
    return bool({*spec.kinds(), *spec.features()} & set(OPEN))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.xfail(reason="not mended yet") if any(map(is_open, models)) else ())
        for kind, models in FOUND.items()
    ],
)
def test_what_was_found(kind: str) -> None:
    for model in FOUND[kind]:
        hold(load(model["spec"]))


def test_every_kind_was_found() -> None:
    assert set(KINDS) <= set(FOUND)


# Whether the judge is one -----------------------------------------------------------------------------------------


def test_plain_models_are_right() -> None:
    found = check.judge(a_spec(LINEAR, {"op": "attention", "how": "sdpa"}))
    assert {name: outcome.verdict for name, outcome in found.items()} == dict.fromkeys(
        ("sketched", "inline", "exact"), "right"
    )


@pytest.mark.parametrize("summed", [False, True])
def test_a_small_error_is_wrong(monkeypatch: pytest.MonkeyPatch, summed: bool) -> None:
    judged = check.compared

    def disturbed(spec: Spec, found: torch.Tensor, *others: object) -> check.Outcome:
        # In one example of the last batch only, and far below what single precision would show.
        found = found.clone()
        found[-1] *= 1 + 1e-8
        return judged(spec, found, *others)

    spec = a_spec(LINEAR)
    spec.summed = summed
    assert {o.verdict for o in check.judge(spec).values()} == {"right"}
    monkeypatch.setattr(check, "compared", disturbed)
    assert {o.verdict for o in check.judge(spec).values()} == {"wrong"}


@pytest.mark.parametrize("how", HOWS["mixing"])
def test_models_that_mix_examples_are_told_from_others(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = a_spec(LINEAR, {"op": "mixing", "how": how})
    assert check.judge(spec)["sketched"].reason == "examples mix"
    spec.mixes = True
    assert check.judge(spec)["sketched"].verdict == "rejected"
    monkeypatch.setattr("stepinfluence.capture.found.followed_to", lambda *_: True)  # as if nothing had been mixed
    assert check.judge(spec, verify=False)["sketched"].verdict == "accepted"


def test_oracle_adds_up_to_the_gradient_of_the_batch() -> None:
    """Its only rival: the parameters' gradient of the summed losses, in a model without hooks on them."""
    model, body, batches = build(a_spec(LINEAR, {"op": "norm", "how": "layer"}))
    truth = Oracle(model, body)(batches, loss_fn)
    model.zero_grad()
    sum(loss_fn(model, batch).sum() for batch in batches).backward()
    whole = torch.cat([p.grad.flatten() for p in model.blocks.parameters()])
    torch.testing.assert_close(truth.gradients.sum((0, 1)), whole, rtol=1e-12, atol=1e-12)
    assert (truth.gradients != 0).any(-1).all()


# Whether the generator is one -------------------------------------------------------------------------------------


def test_every_operation_is_drawn() -> None:
    specs = [draw(Random(seed)) for seed in range(3000)]
    drawn = {(node["op"], node["how"]) for spec in specs for node in walk(spec.body)}
    assert drawn >= {(op, how) for op, hows in HOWS.items() for how in hows}
    backs = {(node["op"], node["back"]) for spec in specs for node in walk(spec.body) if "back" in node}
    assert backs == {(op, back) for op, ways in BACKS.items() for back in ways}
    assert {spec.loop for spec in specs} == set(LOOPS)
    assert {kind for spec in specs for kind in spec.kinds()} == set(KINDS)


def test_specs_are_repeatable_and_survive_being_written() -> None:
    for seed in range(20):
        spec = draw(Random(seed))
        assert draw(Random(seed)) == spec
        assert load(spec.dump()) == spec


def test_shrinking_keeps_what_matters() -> None:
    spec = next(s for s in map(draw, map(Random, range(1000))) if "unpad slices" in s.features() and len(s.body) > 1)
    small = shrink(spec, lambda s: "unpad slices" in s.features() and any(2 in b.lengths for b in s.batches))
    assert [node["op"] for node in small.body] == ["unpad"]
    assert (small.steps, len(small.batches), len(small.batches[0].lengths)) == (1, 1, 1)
