"""Where the sketches of the parameters lie in a row: sum layout, short vectors, parts of a loader."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, ExactCapture, FeatureMismatchError, LossError, attach, influence
from stepinfluence.compat import ProjectedTracInSDI
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("in_float64")

BATCHES = [zoo.make_batch(4, seed=k, dtype=torch.float64) for k in range(3)]


def model() -> nn.Module:
    """Two matrices, two vectors and a gain of six entries each."""
    parts = {"mix": zoo.linear(), "out": zoo.linear(), "norm": nn.LayerNorm(zoo.D)}
    return zoo.Looped(zoo.Core(lambda s, x: s.out(s.mix(s.norm(x)).tanh()), **parts)).eval()


def test_sum_is_the_sum_of_all_parameters_sketches() -> None:
    net = model()
    apart = attach(net, body="core", sketch_size=dict.fromkeys(_names(net), 64))
    together = attach(net, body="core", sketch_size=64, layout="sum")
    for per_step in (True, False):
        wanted = apart.featurize(BATCHES, zoo.squared_error, per_step=per_step).values
        found = together.featurize(BATCHES, zoo.squared_error, per_step=per_step)
        torch.testing.assert_close(found.values, wanted.unflatten(-1, (-1, 64)).sum(-2))
        assert found.values.shape[-1] == together.width == found.space.width == 64
    assert found.space.layout == "sum"
    assert {(b.start, b.stop) for b in found.space.blocks} == {(0, 64)}
    assert "64 columns" in together.explain()
    assert "sum layout" in together.explain()


def _names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters() if name.startswith("core")]


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_sum_is_unbiased(hashing: Any) -> None:
    net = model()
    exact = ExactCapture(net, body="core").featurize(BATCHES, zoo.squared_error)
    wanted = influence(exact, exact).sdi
    trials = []
    for seed in range(300):
        capture = attach(net, body="core", sketch_size=32, layout="sum", hashing=hashing, seed=seed, verify=False)
        features = capture.featurize(BATCHES[:1], zoo.squared_error, progress=False)
        trials.append(influence(features, features).sdi)
    found = torch.stack(trials)
    error = found.mean(0) - wanted[:4, :4]
    assert (error.abs() <= 5 * found.std(0) / 300**0.5 + 1e-12).all(), "parameters' sketches are not independent"


def test_what_sum_refuses() -> None:
    net = model()
    with pytest.raises(ValueError, match="sketch_size: got a mapping, but with layout='sum'"):
        attach(net, body="core", sketch_size=dict.fromkeys(_names(net), 8), layout="sum")
    with pytest.raises(ValueError, match="layout: got 'stack'; use 'concat' or 'sum'"):
        attach(net, body="core", layout="stack")  # type: ignore[arg-type]
    space = attach(net, body="core", sketch_size=32, layout="sum").space()
    with pytest.raises(ValueError, match="in the sum layout, in which all parameters share their columns"):
        space.select("core.mix.*")
    with pytest.raises(FeatureMismatchError, match="other sketches"):
        space.require_equal(attach(net, body="core", sketch_size=32).space())


def test_columns_of_some_parameters() -> None:
    space = attach(model(), body="core", sketch_size=32).space()
    assert [b.name for b in space.select("*.weight")] == ["core.mix.weight", "core.out.weight", "core.norm.weight"]
    assert [b.name for b in space.select(["core.out.*", "*.norm.bias"])] == [
        "core.out.weight", "core.out.bias", "core.norm.bias",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=re.escape("parameters: 'core.attn.*' fits none of core.")):
        space.select(["*", "core.attn.*"])


def test_short_vectors_are_kept_without_loss() -> None:
    """Balanced hashing gives a vector as many columns as it has entries: their inner products are exact."""
    net = model()
    capture = attach(net, body="core", sketch_size=32)
    sizes = {t.name: t.sketch.m for t in capture.targets}
    assert sizes == {name: 32 if name in ("core.mix.weight", "core.out.weight") else zoo.D for name in sizes}
    assert capture.width == 2 * 32 + 4 * zoo.D
    assert capture.explain().count("lossless") == 4
    sketched = capture.featurize(BATCHES, zoo.squared_error)
    exact = ExactCapture(net, body="core").featurize(BATCHES, zoo.squared_error)
    for ours, theirs in zip(sketched.space.blocks, exact.space.blocks, strict=True):
        if len(ours.shape) == 1:
            x, y = sketched.values[..., ours.start : ours.stop], exact.values[..., theirs.start : theirs.stop]
            torch.testing.assert_close(torch.einsum("nsd,mtd->nsmt", x, x), torch.einsum("nsd,mtd->nsmt", y, y))


def test_sizes_that_are_asked_for_by_name_are_kept() -> None:
    net = model()
    assert attach(net, body="core", sketch_size=32, hashing="iid").width == 6 * 32
    assert attach(net, body="core", sketch_size=dict.fromkeys(_names(net), 32)).width == 6 * 32


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_the_published_interface_has_its_m_columns(hashing: Any) -> None:
    estimator = ProjectedTracInSDI(model=(net := model()), target_modules=net.core, projection_size=16, hashing=hashing)  # type: ignore[arg-type]
    found = estimator.featurize_loader(loader=BATCHES, loss_fn=zoo.squared_error)
    assert {phi.shape for phi in found.phi.values()} == {(12, zoo.STEPS, 16)}


@pytest.mark.parametrize("make", [lambda m: attach(m, body="core", sketch_size=16, training=True),
                                  lambda m: ExactCapture(m, body="core", training=True)])  # fmt: skip
def test_a_part_of_a_loader_is_featurized_as_in_the_whole(make: Any) -> None:
    """Dropout in training mode: random state goes by the number of the batch, whoever featurizes it."""
    net = zoo.Looped(zoo.Core(lambda s, x: F.dropout(s.mix(x), 0.5, s.training).tanh(), mix=zoo.linear()))
    capture = make(net)
    whole = capture.featurize(BATCHES, zoo.squared_error).values
    parts = [capture.featurize([b], zoo.squared_error, first_batch=k).values for k, b in enumerate(BATCHES)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(make(net).featurize([BATCHES[1]], zoo.squared_error).values, parts[1])
    with pytest.raises(ValueError, match="first_batch: got -1"):
        capture.featurize(BATCHES, zoo.squared_error, first_batch=-1)


def mixed(core: Any, x: Tensor) -> Tensor:
    return core.mix(x - x.mean(0)).tanh()


def test_verification_can_be_left_out_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what mixes had not been followed to the losses: then verification is what finds it."""
    monkeypatch.setattr("stepinfluence.capture.found.followed_to", lambda *_: True)
    capture = attach(zoo.Looped(zoo.Core(mixed, mix=zoo.linear())), body="core", sketch_size=16)
    with pytest.raises(ValueError, match="changes with the losses of other examples"):
        capture.featurize(BATCHES, zoo.squared_error)
    capture.featurize(BATCHES, zoo.squared_error, verify=False)
    with pytest.raises(ValueError, match="changes with the losses of other examples"):
        capture.featurize(BATCHES, zoo.squared_error)


def test_a_parameter_that_the_first_batch_does_without() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.common, self.rare = zoo.linear(), zoo.linear()

        def forward(self, x: Tensor) -> Tensor:
            return (self.rare(x) if x.shape[1] == 5 else self.common(x)).tanh()

    net = zoo.Looped(Routed())
    ones = [zoo.make_batch(1, 4), zoo.make_batch(1, 5)]
    attach(net, body="core", sketch_size=16).featurize(ones, zoo.squared_error)
    attach(net, body="core", sketch_size=16).featurize(ones[:1], zoo.squared_error, verify=False)
    with pytest.raises(BodyError, match=r"core\.rare\.weight, core\.rare\.bias: never used"):
        attach(net, body="core", sketch_size=16).featurize([ones[0], ones[0]], zoo.squared_error)


def test_a_model_with_a_random_generator_of_its_own_is_named_as_such() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(core: Any, x: Tensor) -> Tensor:
        return core.mix(x + torch.randn(x.shape, generator=generator)).tanh()

    capture = attach(zoo.Looped(zoo.Core(noisy, mix=zoo.linear())), body="core", sketch_size=16)
    with pytest.raises(LossError, match="gives other losses when it is run again"):
        capture.featurize(BATCHES, zoo.squared_error)
