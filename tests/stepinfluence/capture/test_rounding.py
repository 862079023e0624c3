"""The bound of rounding.py fails for what is wrong, and the reference runs leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from rounding import MOVE, Rounding, check_influence, in_double, measure_body
from stepinfluence import ExactCapture, attach
from torch import Tensor, nn

pytestmark = pytest.mark.numeric


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.Looped(zoo.LAYERS["mlp"]()).eval()


def sides() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    return [zoo.make_batch(3), zoo.make_batch(2, 5)], [zoo.make_batch(2, seed=1)]


def rounding(model: nn.Module, batches: list[dict[str, Tensor]]) -> Rounding:
    names = [f"core.{name}" for name, _ in model.core.named_parameters()]
    return measure_body(model, batches, zoo.squared_error, model.core, names)


# Mistakes of a capture, made in its result (examples, steps, columns).
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a step left out": lambda v: torch.cat([v[:, :1] * 0, v[:, 1:]], 1),
    "steps exchanged": lambda v: v.flip(1),
    "a step counted twice": lambda v: torch.cat([2 * v[:, :1], v[:, 1:]], 1),
    "examples exchanged": lambda v: v[[1, 0, *range(2, len(v))]],
    "sign swapped": lambda v: -v,
    "shifted by a bucket": lambda v: v.roll(1, -1),
    "one part in ten thousand": lambda v: v * 1.0001,
    "half precision": lambda v: v.bfloat16().float(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_features_are_noticed(model: nn.Module, wrong: str) -> None:
    batches, query = sides()
    of = rounding(model, batches)
    capture = attach(model, body="core", sketch_size=64)
    tables = {t.name: t.sketch for t in capture.targets}
    values = capture.featurize(batches, zoo.squared_error).values
    exact = ExactCapture(model, body="core").featurize(batches, zoo.squared_error).values
    of.check_sketches(values, "", tables, per_step=True)
    of.check_gradients(exact, "")
    with pytest.raises(AssertionError, match="times what is allowed"):
        of.check_sketches(WRONG[wrong](values), "", tables, per_step=True)
    with pytest.raises(AssertionError, match="times what is allowed"):
        of.check_gradients(WRONG[wrong](exact), "")
    if wrong != "steps exchanged":  # the train side is summed over them
        right = ExactCapture(model, body="core").featurize(query, zoo.squared_error).values
        parts = [(1.0, of, rounding(model, query))]
        check_influence(torch.einsum("nsd,qtd->nqt", exact, right), parts, "")
        with pytest.raises(AssertionError, match="times what is allowed"):
            check_influence(torch.einsum("nsd,qtd->nqt", WRONG[wrong](exact), right), parts, "")


def test_a_token_left_out_is_noticed(model: nn.Module) -> None:
    batches, _ = sides()
    of = rounding(model, batches)
    without = [{"x": b["x"][:, 1:], "y": b["y"][:, 1:]} for b in batches]
    found = ExactCapture(model, body="core").featurize(without, zoo.squared_error).values
    with pytest.raises(AssertionError, match="times what is allowed"):
        of.check_gradients(found, "")


def test_a_loss_that_cancels_moves_the_bound_and_no_more() -> None:
    """The example of the first report: outputs near their targets, so each loss is a small difference."""
    torch.manual_seed(0)
    model = zoo.Looped(zoo.LAYERS["linear, 2-d input"]()).eval()
    batch = zoo.make_batch(3)
    with torch.no_grad():
        batch["y"] = model(batch["x"]).squeeze(-1) * (1 + 1e-5)
    of = rounding(model, [batch])
    exact = ExactCapture(model, body="core").featurize([batch], zoo.squared_error).values
    of.check_gradients(exact, "")
    relative = (of.plain["core.mix.weight"] - of.exact["core.mix.weight"]).norm() / of.exact["core.mix.weight"].norm()
    assert relative > 1e-4, "plain torch loses more than any fixed tolerance allowed"
    with pytest.raises(AssertionError, match="times what is allowed"):
        of.check_gradients(1.5 * exact, "")


def test_the_model_is_as_it_was(model: nn.Module) -> None:
    model.register_buffer("table", torch.randn(3))
    before = {n: (id(t), t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    with in_double(model, lambda t: t * (1 + MOVE)):
        assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {torch.float64}
        assert torch.zeros(1).float().dtype == torch.float64
    after = {n: (id(t), t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, (identity, values) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], values)
    assert torch.zeros(1).dtype == torch.float32
