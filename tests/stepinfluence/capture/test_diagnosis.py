"""A check that fails names the cause that there is, not another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, ExactCapture, LayoutError, LossError, UnsupportedUseError, attach
from torch import Tensor, nn

CAPTURES = pytest.mark.parametrize("make", [attach, ExactCapture])
BATCH = zoo.make_batch(3)


def run(make: Any, model: nn.Module, loss: Any = zoo.squared_error, batch: Any = BATCH, **options: Any) -> Any:
    return make(model, body="core", **options).featurize([batch], loss)


def mlp() -> zoo.Looped:
    return zoo.Looped(zoo.LAYERS["mlp"]())


class Hooked(zoo.Looped):
    """Sends the gradient of the state through a function at every step."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__(zoo.linear())
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        state = injected = self.read_in(x)
        for _ in range(self.steps):
            state = self.core(state).tanh() + injected
            state.register_hook(self.through)
        return self.read_out(state)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sign()


NONLINEAR: dict[str, Callable[[], nn.Module]] = {
    "clamped": lambda: Hooked(lambda g: g.clamp(-1e-3, 1e-3)),
    "sign": lambda: Hooked(torch.sign),
    "norm of the example": lambda: Hooked(lambda g: g / (1e-3 + g.flatten(1).norm(dim=1)[:, None, None])),
    "thresholded": lambda: Hooked(lambda g: g * (g.abs() > 1e-3)),
    "custom function": lambda: zoo.Looped(zoo.Core(lambda s, h: Rounded.apply(s.mix(h)).tanh(), mix=zoo.linear())),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_clips_gradients_is_not_called_mixing(name: str) -> None:
    with pytest.raises(UnsupportedUseError, match=r"core\.\S+: its gradient is not proportional to the loss.*clips"):
        run(attach, NONLINEAR[name]())


@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_underflow_in_half_precision_is_called_that(scale: float) -> None:
    model = mlp().half()
    batch = {k: v.half() for k, v in BATCH.items()}
    with pytest.raises(LossError, match=r"core\..*half precision \(fp16\).*multiply the loss"):
        run(attach, model, lambda m, b: scale * zoo.squared_error(m, b), batch)
    run(attach, model, zoo.squared_error, batch)


def test_mixing_is_still_called_mixing() -> None:
    model = zoo.Looped(zoo.Core(lambda s, h: (s.mix(h) - h.mean(0)).tanh(), mix=zoo.linear()))
    with pytest.raises(LayoutError, match="changes with the losses of other examples"):
        run(attach, model)


@CAPTURES
@pytest.mark.parametrize("how", ["assigned", "assign=True", "converted", "module"])
def test_parameters_replaced_after_attach(make: Any, how: str) -> None:
    model = mlp()
    capture = make(model, body="core")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if how == "assigned":
        model.core[0].weight = nn.Parameter(model.core[0].weight.detach().clone())
    elif how == "assign=True":
        model.load_state_dict(state, assign=True)
    elif how == "converted":
        for module in model.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.detach().clone())
    else:
        model.core[0] = nn.Linear(zoo.D, model.core[0].out_features)
    replaced = model.core[0].weight
    with pytest.raises(BodyError, match=r"core\.0\.weight: is not in the model any more.*attach again"):
        capture.featurize([BATCH], zoo.squared_error)
    assert model.core[0].weight is replaced


@CAPTURES
def test_parameters_frozen_after_attach(make: Any) -> None:
    model = mlp()
    capture = make(model, body="core")
    model.core[0].weight.requires_grad_(False)
    with pytest.raises(BodyError, match=r"core\.0\.weight: requires_grad was switched off"):
        capture.featurize([BATCH], zoo.squared_error)


@CAPTURES
def test_weights_made_under_inference_mode(make: Any) -> None:
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(BodyError, match=r"core\.0\.weight: was made under torch\.inference_mode"):
        run(make, model)


@CAPTURES
def test_inputs_and_caches_made_under_inference_mode(make: Any) -> None:
    model = zoo.Looped(zoo.Core(lambda s, h: s.mix(h).tanh() * s.scale * s.kept, mix=zoo.linear(), scale=torch.ones(6)))
    model.core.kept = torch.full((), 0.5)
    expected = run(make, model).values
    with torch.inference_mode():
        batch = {k: v.clone() for k, v in BATCH.items()}
        model.core.scale = torch.ones(6)
        kept = model.core.kept = torch.full((), 0.5)
    assert torch.equal(run(make, model, batch=batch).values, expected)
    assert model.core.kept is kept
    assert model.core.scale.is_inference()


@CAPTURES
@pytest.mark.parametrize("where", ["batch", "attribute", "loss"])
def test_tensors_kept_from_an_earlier_pass(make: Any, where: str) -> None:
    model = zoo.Looped(zoo.Core(lambda s, h: s.mix(h).tanh() * s.factor, mix=zoo.linear()))
    model.core.factor = torch.ones(())
    kept = model.core.mix.weight.exp().mean()
    if where == "attribute":
        model.core.factor = kept
    batch = {**BATCH, "x": BATCH["x"] * kept} if where == "batch" else BATCH
    with pytest.raises(UnsupportedUseError, match=r"core\.mix\.weight: reaches the loss through .*an earlier pass"):
        run(make, model, lambda m, b: zoo.squared_error(m, b) * (kept if where == "loss" else 1), batch)


def test_activations_kept_from_the_batch_before() -> None:
    """A state carried over with its graph, by something that is no module."""
    kept: list[Tensor] = []

    class Carrying(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            state = self.core(self.read_in(x)).tanh()
            kept.append(state if not kept else state + kept[0])
            return self.read_out(kept[-1])

    with pytest.raises(UnsupportedUseError, match=r"model: reaches the loss through .*an earlier pass"):
        attach(Carrying(zoo.linear()), body="core", verify=False).featurize([BATCH, BATCH], zoo.squared_error)


@CAPTURES
def test_loop_of_training_mode_only(make: Any) -> None:
    class Conditional(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else self.read_out(self.read_in(x))

    model = Conditional(zoo.linear()).train()
    with pytest.raises(BodyError, match="in training mode only, and was run in eval mode; pass training=True"):
        run(make, model)
    run(make, model, training=True)
    assert model.training

    class Never(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            return self.read_out(self.read_in(x))

    with pytest.raises(BodyError, match="body must be the module"):
        run(make, Never(zoo.linear()))


def test_losses_that_differ_say_where_the_difference_is() -> None:
    calls = []
    generator = torch.Generator()

    def own_generator(m: nn.Module, batch: Any) -> Tensor:
        return zoo.squared_error(m, {**batch, "x": batch["x"] + torch.randn(3, 4, 5, generator=generator)})

    def counting(m: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return zoo.squared_error(m, batch) * len(calls)

    for loss in (own_generator, counting):
        with pytest.raises(LossError, match=r"loss_fn: gives other losses.*keep no state outside of modules"):
            run(attach, mlp(), loss)
    calls.clear()

    def once(m: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return zoo.squared_error(m, batch) * (2 if len(calls) == 1 else 1)

    with pytest.raises(LossError, match=r"two plain passes agree.*how often it was called"):
        run(attach, mlp(), once)


def test_idle_experts_get_advice_for_experts() -> None:
    core = zoo.Core(lambda s, h: s.experts[0](h).tanh(), experts=nn.ModuleList([zoo.linear(), zoo.linear()]))
    with pytest.raises(BodyError, match=r"core\.experts\.1\.weight.*an expert that no token chose.*verify=False"):
        run(attach, zoo.Looped(core))
    features = run(attach, zoo.Looped(core), verify=False)
    block = next(b for b in features.space.blocks if b.name == "core.experts.1.weight")
    assert not features.values[..., block.start : block.stop].any()


def test_one_shot_hooks_on_activations_are_refused_by_the_exact_capture() -> None:
    """One graph is differentiated once per example: only the first would meet the hook."""

    class Once(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            state = self.core(self.read_in(x))

            def hook(grad: Tensor) -> Tensor:
                handle.remove()
                return 3 * grad

            handle = state.register_hook(hook)
            return self.read_out(state)

    with pytest.raises(UnsupportedUseError, match=r"core\.\S+: its gradient is another one when it is taken again"):
        run(ExactCapture, Once(zoo.linear()))
    run(ExactCapture, Once(zoo.linear()), batch=zoo.make_batch(1))
    run(attach, Once(zoo.linear()))  # one backward pass, for all examples
