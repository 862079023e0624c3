"""Gradient hooks on body parameters: fixed factors are applied to every example and step, all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import FLOAT64, flat, relative
from oracle import sketched, step_gradients
from stepinfluence import ExactCapture, FeatureMismatchError, UnsupportedUseError, attach, influence
from stepinfluence.attribution.preconditioners import Elementwise
from stepinfluence.search import rerank
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("in_float64")

CAPTURES = pytest.mark.parametrize("make", [attach, ExactCapture])
ROWS = (torch.arange(zoo.D) >= 2).float().unsqueeze(1)
BATCH = zoo.make_batch(3, dtype=torch.float64)

FACTORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "rows masked": lambda g: g * ROWS[: len(g)].reshape(-1, *[1] * (g.dim() - 1)),
    "scaled": lambda g: 0.5 * g,
    "sign turned": lambda g: -g,
    "single entries masked": lambda g: g * (torch.arange(g.numel()).reshape(g.shape) % 3 > 0),
    "checkerboard of signs, not a number removed": lambda g: (g * (-1.0) ** torch.arange(g.shape[-1])).nan_to_num(),
    "switched off": torch.zeros_like,
    "written in place": lambda g: [None, g.mul_(2.0)][0],
    "only looked at": lambda g: None,
}


def model() -> zoo.Looped:
    """Used as it stands, transposed, through a function, and as a vector."""
    torch.manual_seed(3)

    def forward(core: Any, h: Tensor) -> Tensor:
        h = core.mix(h).tanh() @ core.turn.t()
        return h * core.gain.exp() + core.shift

    parts = {"mix": zoo.linear(), "turn": zoo.normal(zoo.D, zoo.D), "gain": zoo.normal(zoo.D), "shift": zoo.normal(6)}
    return zoo.Looped(zoo.Core(forward, **parts))


def expected_with(hook: Callable[[Tensor], Any], given: zoo.Looped, names: list[str]) -> dict[str, Tensor]:
    """The oracle's gradients, each sent through the hook by itself."""
    grads = step_gradients(given, BATCH, zoo.squared_error, body=[given.core], names=names)

    def through(grad: Tensor) -> Tensor:
        grad = grad.clone()
        result = hook(grad)
        return grad if result is None else result

    return {
        name: torch.stack([torch.stack([through(step) for step in example]) for example in value])
        for name, value in grads.items()
    }


@pytest.mark.parametrize("name", FACTORS)
def test_fixed_factors_are_applied(name: str) -> None:
    given = model()
    names = [n for n, _ in given.named_parameters() if n.startswith("core.")]
    expected = expected_with(FACTORS[name], given, names)
    for parameter in given.core.parameters():
        parameter.register_hook(FACTORS[name])
    before = [dict(p._backward_hooks) for p in given.core.parameters()]
    capture = attach(given, body="core", sketch_size=64)
    columns = flat(expected)
    want = sketched(expected, {t.name: t.sketch for t in capture.targets})
    size = float(flat(expected).norm()) + 1e-30
    for features, target in (
        (capture.featurize([BATCH], zoo.squared_error).values, want),
        (capture.featurize([BATCH], zoo.squared_error, per_step=False).values, want.sum(1)),
        (ExactCapture(given, body="core").featurize([BATCH], zoo.squared_error).values, columns),
    ):
        assert float((features.double() - target).norm()) <= FLOAT64 * size
    assert before == [dict(p._backward_hooks) for p in given.core.parameters()]
    exact = rerank(capture, zoo.squared_error, [BATCH], [BATCH], progress=False)
    wanted = torch.einsum("nd,qtd->nqt", columns.sum(1), columns)
    assert float((exact.sdi - wanted).norm()) <= FLOAT64 * (float(wanted.norm()) + 1e-30)


def test_exact_influence_has_hooks_before_anything_was_featurized() -> None:
    given = model()
    for parameter in given.core.parameters():
        parameter.register_hook(FACTORS["rows masked"])
    first, later = (attach(given, body="core", sketch_size=64) for _ in range(2))
    later.featurize([BATCH], zoo.squared_error)
    ours, theirs = (rerank(c, zoo.squared_error, [BATCH], [BATCH], progress=False).sdi for c in (first, later))
    torch.testing.assert_close(ours, theirs)


def test_hooks_and_a_metric_together() -> None:
    given = model()
    roots = {n: Elementwise(torch.rand_like(p) + 0.5) for n, p in given.named_parameters() if n.startswith("core.")}
    plain = attach(given, body="core", preconditioner=roots, sketch_size=64)
    given.core.turn.register_hook(lambda g: 3.0 * g)
    found, before = (c.featurize([BATCH], zoo.squared_error) for c in (plain, attach(given, body="core")))
    block = next(b for b in found.space.blocks if b.name == "core.turn")
    given.core.turn._backward_hooks.clear()
    unhooked = plain.featurize([BATCH], zoo.squared_error)
    ours, theirs = (f.values[..., block.start : block.stop] for f in (found, unhooked))
    torch.testing.assert_close(ours, 3 * theirs)
    with pytest.raises(FeatureMismatchError, match="gradient hooks"):
        influence(found, unhooked)
    assert before.space.metric != ""


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "clips": (lambda g: g.clamp(-1, 1), "is not linear"),
    "normalises": (lambda g: g / g.norm(), "is not linear"),
    "adds": (lambda g: g + 1, "is not linear|not finite"),
    "rounds": (lambda g: g.half().float(), "is not linear|not finite"),
    "random": (lambda g: g * torch.rand_like(g), "gives another result when it is called again"),
    "centralises": (lambda g: g - g.mean(), "mixes the entries"),
    "turns": (lambda g: g.flip(0), "mixes the entries"),
    "fails": (lambda g: g.no_such_thing, "fails on a gradient made up .*AttributeError"),
    "other shape": (lambda g: g[:1], "fails on a gradient made up"),
}


@CAPTURES
@pytest.mark.parametrize("name", REFUSED)
def test_other_hooks_are_refused(make: Any, name: str) -> None:
    hook, why = REFUSED[name]
    given = model()
    given.core.turn.register_hook(hook)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedUseError, match=rf"^core\.turn: .*({why}).*remove the hook") as caught:
        make(given, body="core").featurize([BATCH], zoo.squared_error)
    assert "\n" not in str(caught.value)
    assert len(given.core.turn._backward_hooks) == 1
    assert torch.equal(state, torch.get_rng_state())


@CAPTURES
def test_hooks_that_act_once_or_keep_count_are_refused(make: Any) -> None:
    given, calls = model(), []
    handle = given.core.turn.register_hook(lambda g: handle.remove() or 2 * g)
    with pytest.raises(UnsupportedUseError, match=r"core\.turn: its gradient hook takes itself off"):
        make(given, body="core").featurize([BATCH], zoo.squared_error)
    assert len(given.core.turn._backward_hooks) == 1
    handle.remove()
    given.core.turn.register_hook(lambda g: calls.append(1) or g / len(calls))
    with pytest.raises(UnsupportedUseError, match=r"core\.turn: .*keeps count"):
        make(given, body="core").featurize([BATCH], zoo.squared_error)


@CAPTURES
def test_hooks_on_accumulated_gradients_are_refused(make: Any) -> None:
    given = model()
    given.core.gain.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    with pytest.raises(UnsupportedUseError, match=r"core\.gain: has a post-accumulate-grad hook"):
        make(given, body="core").featurize([BATCH], zoo.squared_error)


def test_hooks_put_on_in_the_forward_pass_are_refused() -> None:
    def forward(core: Any, h: Tensor) -> Tensor:
        core.mix.weight.register_hook(lambda g: g * 0.5)
        return core.mix(h).tanh()

    given = zoo.Looped(zoo.Core(forward, mix=zoo.linear()))
    with pytest.raises(UnsupportedUseError, match=r"core\.mix\.weight: the forward pass puts a gradient hook on it"):
        attach(given, body="core").featurize([BATCH], zoo.squared_error)
    assert not given.core.mix.weight._backward_hooks


@pytest.mark.parametrize("derived", ["view", "function"])
def test_hooks_on_tensors_made_of_parameters_alone(derived: str) -> None:
    """They act on the way back to the parameter: a mask on ``W.t()`` is a mask on W."""
    mask = (torch.arange(zoo.D) > 1).float()

    def forward(core: Any, h: Tensor) -> Tensor:
        weight = core.weight.t() if derived == "view" else core.weight * 1.5
        weight.register_hook(lambda g: g * mask)
        return (h @ weight).tanh()

    given = zoo.Looped(zoo.Core(forward, weight=zoo.normal(zoo.D, zoo.D)))
    names = ["core.weight"]
    grads = step_gradients(given, BATCH, zoo.squared_error, body=[given.core], names=names)
    capture = attach(given, body="core", sketch_size=64)
    want = sketched(grads, {t.name: t.sketch for t in capture.targets})
    assert relative(capture.featurize([BATCH], zoo.squared_error).values, want) <= FLOAT64
    exact = ExactCapture(given, body="core").featurize([BATCH], zoo.squared_error)
    assert relative(exact.values, flat(grads)) <= FLOAT64


def test_a_frozen_parameter_may_have_any_hook() -> None:
    given = model()
    given.read_out.weight.register_hook(lambda g: g.clamp(-1, 1))
    attach(given, body="core", sketch_size=8).featurize([BATCH], zoo.squared_error)
    assert isinstance(given.core.mix, nn.Linear)
