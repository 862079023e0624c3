"""Training steps that are featurized inline, against runs of their own and plain autograd.

That a run of its own is right is what the other files of this folder test.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, Capture, LayoutError, LossError, UnsupportedUseError, attach
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import D

BOUND = 1e-10
"""Relative, in float64: a hundred thousand times its rounding."""
LossFn = Callable[[Any, Any], Tensor]


def batch_of(size: int = 3, tokens: int = 4) -> dict[str, Tensor]:
    return zoo.make_batch(size, tokens, seed=size, dtype=torch.float64)


def looped(core: nn.Module) -> zoo.Looped:
    return zoo.Looped(core).double().eval()


def dense() -> zoo.Looped:
    torch.manual_seed(7)
    return looped(zoo.with_dense(nn.LayerNorm(D)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(model: nn.Module, capture: Capture, loss_fn: LossFn = zoo.squared_error, *, size: int = 3) -> None:
    """An inline step gives the features of a run of its own, and the gradients of an ordinary step."""
    model.zero_grad()
    batch = batch_of(size)
    expected = capture.featurize([batch], loss_fn)
    # Powers of two: where a part of the model computes in less than float64, they change no digit.
    weights = (2.0 ** torch.arange(size)).double()
    if capture.owners == "found":
        with pytest.raises(LayoutError, match="cannot be followed"), capture.inline(batch) as inline:
            inline.losses(loss_fn(model, batch))
        return
    (loss_fn(model, batch) * weights).sum().backward()
    plain = gradients(model)
    for per_step in (True, False):
        with capture.inline(batch, per_step=per_step, verify=True) as inline:
            (inline.losses(loss_fn(model, batch)) * weights).sum().backward()
        found, features = gradients(model), inline.features
        want = expected if per_step else expected.summed()
        assert float((features.values - want.values).norm()) <= BOUND * float(want.values.norm())
        torch.testing.assert_close(inline.weights, weights)
        torch.testing.assert_close(features.losses, want.losses)
        assert features.space == want.space
        assert features.content == want.content
        assert per_step is False or features.lengths.tolist() == expected.lengths.tolist()
        assert found.keys() == plain.keys()
        largest = max(float(g.norm()) for g in plain.values())
        for name, gradient in plain.items():
            assert float((found[name] - gradient).norm()) <= BOUND * largest, name


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_every_kind_of_use(name: str) -> None:
    torch.manual_seed(len(name))
    model = looped(zoo.LAYERS[name]())
    check(model, attach(model, body="core", sketch_size=64), size=3)


@pytest.mark.parametrize("layout", ["concat", "sum"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_sizes_and_layouts(size: int, layout: Any) -> None:
    model = dense()
    check(model, attach(model, body="core", sketch_size=32, layout=layout), size=size)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.GRUCell])
def test_recurrent(kind: Any) -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        if isinstance(core.layer, nn.GRUCell):
            return core.layer(x.reshape(-1, D)).view_as(x)
        return core.layer(x)[0]

    torch.manual_seed(3)
    options = {} if kind is nn.GRUCell else {"batch_first": True}
    model = looped(zoo.Core(forward, layer=kind(D, D, **options)))
    check(model, attach(model, body="core", sketch_size=32))


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.with_dense(nn.LayerNorm(D))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(5)
    model = looped(Checkpointed())
    check(model, attach(model, body="core", sketch_size=32))


@pytest.mark.parametrize("factor", [2.0, "mask"])
def test_hooks_on_parameters_act_on_both(factor: Any) -> None:
    model = dense()
    parameter = next(p for p in model.core.parameters() if p.dim() == 2)
    mask = (torch.arange(len(parameter)) % 2).double().unsqueeze(1) if factor == "mask" else factor
    parameter.register_hook(lambda gradient: gradient * mask)
    check(model, attach(model, body="core", sketch_size=32))


def test_hooks_on_a_parametrized_weight() -> None:
    torch.manual_seed(6)
    model = looped(zoo.LAYERS["weight norm"]())
    for parameter in model.core.parameters():
        parameter.register_hook(lambda gradient: gradient * 2)
    check(model, attach(model, body="core", sketch_size=32))


def test_a_training_loop() -> None:
    """Gradients accumulate over two batches, are clipped and stepped; features are at the weights before."""
    model, twin = dense(), dense()
    capture = attach(model, body="core", sketch_size=64)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, twin)]
    for step in range(3):
        for k in range(2):
            batch = batch_of(2 + k, 3 + step)
            expected = capture.featurize([batch], zoo.squared_error, per_step=False)
            with capture.inline(batch, ids=[f"{step}.{k}.{i}" for i in range(2 + k)]) as inline:
                (inline.losses(zoo.squared_error(model, batch)).mean() / 2).backward()
            (zoo.squared_error(twin, batch).mean() / 2).backward()
            assert float((inline.features.values - expected.values).norm()) <= BOUND * float(expected.values.norm())
            assert inline.features.ids[0] == f"{step}.{k}.0"
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_the_model_runs_in_its_own_mode() -> None:
    """Dropout draws as it would without a capture."""
    torch.manual_seed(8)
    model = zoo.Looped(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Tanh())).double().train()
    capture = attach(model, body="core", sketch_size=32)
    torch.manual_seed(1)
    plain = zoo.squared_error(model, batch_of())
    torch.manual_seed(1)
    with capture.inline(batch_of()) as inline:
        losses = inline.losses(zoo.squared_error(model, batch_of()))
        losses.sum().backward()
    assert torch.equal(losses, plain)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    model = zoo.Looped(zoo.with_dense(nn.LayerNorm(D))).float().eval()
    capture = attach(model, body="core", sketch_size=64)
    batch = zoo.make_batch(3, 4, seed=1, dtype=torch.float32)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return zoo.squared_error(model, batch).float()

    expected = capture.featurize([batch], loss_fn)
    with capture.inline(batch, per_step=True) as inline:
        (inline.losses(loss_fn(model, batch)).sum() * 1024).backward()  # as a scaler multiplies
    error = float((inline.features.values - expected.values).norm() / expected.values.norm())
    # A loss that is multiplied by a power of two changes no digit, but for what was below float16's smallest number.
    assert error <= (2e-7 if dtype == torch.bfloat16 else torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------------------------------------
# Refused


def step(model: nn.Module, capture: Capture, reduce: Callable[[Tensor], Tensor], **options: Any) -> Any:
    with capture.inline(batch_of(), **options) as inline:
        reduce(inline.losses(zoo.squared_error(model, batch_of()))).backward()
    return inline


def test_what_goes_around_the_losses_is_refused() -> None:
    model = dense()
    capture = attach(model, body="core", sketch_size=16)
    with capture.inline(batch_of()) as inline:
        out = model(batch_of()["x"])
        total = inline.losses(out.squeeze(-1).square().mean(1)).mean() + 0.1 * out.abs().mean()
        with pytest.raises(LossError, match="reaches the loop body beside the losses"):
            total.backward()
    # What does not touch the body may be added.
    step(model, capture, lambda losses: losses.mean() + 0.1 * model.read_out.weight.square().sum())


def test_a_weight_of_zero_leaves_nothing_to_know() -> None:
    model = dense()
    inline = step(model, attach(model, body="core", sketch_size=16), lambda losses: losses[1:].sum())
    with pytest.raises(LossError, match=r"weights example\(s\) 0 of the batch with 0"):
        _ = inline.features
    assert all(p.grad is not None for p in model.core.parameters()), "training goes on"


def test_gradients_that_are_not_finite_do_not_disturb_training() -> None:
    model = dense()
    inline = step(model, attach(model, body="core", sketch_size=16), lambda losses: losses.sum() * torch.inf)
    with pytest.raises(LossError, match="NaN or infinite"):
        _ = inline.features


def test_a_batch_without_examples_gives_no_rows() -> None:
    model = dense()
    capture = attach(model, body="core", sketch_size=16)
    batch = {name: values[:0] for name, values in batch_of().items()}
    with capture.inline(batch) as inline:
        inline.losses(zoo.squared_error(model, batch)).mean().backward()
    assert inline.features.values.shape == (0, capture.width)


def test_what_is_forgotten_is_said() -> None:
    model = dense()
    capture = attach(model, body="core", sketch_size=16)
    with pytest.raises(LossError, match="no losses were given"), capture.inline(batch_of()):
        zoo.squared_error(model, batch_of())
    with pytest.raises(LossError, match="before losses were given"), capture.inline(batch_of()):
        zoo.squared_error(model, batch_of()).sum().backward()
    with capture.inline(batch_of()) as inline:
        losses = inline.losses(zoo.squared_error(model, batch_of()))
    losses.sum().backward()  # outside: an ordinary one
    with pytest.raises(LossError, match="no backward pass came through"):
        _ = inline.features
    with pytest.raises(LossError, match=r"expected \(3,\)"), capture.inline(batch_of()) as inline:
        inline.losses(zoo.squared_error(model, batch_of()).mean())
    with pytest.raises(BodyError, match="never entered"), capture.inline(batch_of()) as inline:
        inline.losses(batch_of()["y"].mean(1).requires_grad_() * 1)
    with capture.inline(batch_of()) as inline:
        total = inline.losses(zoo.squared_error(model, batch_of())).sum()
        total.backward(retain_graph=True)
        with pytest.raises(LossError, match="a second backward pass"):
            total.backward()
    with pytest.raises(LayoutError, match="no size in common"):
        capture.inline({"x": torch.zeros(2, 3), "y": torch.zeros(5)})
    check(model, capture)  # and none of it stays


@pytest.mark.parametrize("where", ["module", "activation"])
def test_hooks_that_see_gradients_are_refused(where: str) -> None:
    """They may do to them what no forward pass shows."""

    def forward(core: Any, x: Tensor) -> Tensor:
        y = core.mix(x)
        if where == "activation":
            y.register_hook(lambda gradient: gradient - gradient.mean(0))
        return y.tanh()

    model = looped(zoo.Core(forward, mix=nn.Linear(D, D)))
    if where == "module":
        model.core.mix.register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedUseError, match="a hook of the model's sees gradients"):
        step(model, attach(model, body="core", sketch_size=16), lambda losses: losses.sum())


def test_examples_that_mix_are_refused() -> None:
    torch.manual_seed(2)
    model = looped(zoo.Core(lambda s, x: (s.mix(x) - x.mean(0)).tanh(), mix=nn.Linear(D, D)))
    capture = attach(model, body="core", sketch_size=16)
    with pytest.raises(LayoutError, match="cannot be followed"):
        step(model, capture, lambda losses: losses.sum())


class _Unseen(torch.autograd.Function):
    """A product that nobody sees, as one by an extension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


def test_uses_out_of_sight_are_missing_in_the_sum() -> None:
    """The weight is used twice; one of the two is out of sight."""

    def forward(core: Any, x: Tensor) -> Tensor:
        seen = x @ core.p
        with torch._C.DisableTorchFunction():
            return (seen + _Unseen.apply(x, core.p)).tanh()

    torch.manual_seed(4)
    model = looped(zoo.Core(forward, p=zoo.normal(D, D)))
    capture = attach(model, body="core", sketch_size=64)
    try:
        inline = step(model, capture, lambda losses: losses.sum(), verify=True)
    except LayoutError:
        return  # seen on the way forward
    with pytest.raises(LayoutError, match=r"core\.p: .*do not add up"):
        _ = inline.features


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_that_are_zero_but_for_rounding_add_up(dtype: torch.dtype) -> None:
    """A softmax does not change if the same is added to all its inputs: a bias of the keys has no gradient."""

    def forward(core: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unsqueeze(1) for part in (core.q, core.k, core.v))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)

    torch.manual_seed(11)
    model = zoo.Looped(zoo.Core(forward, q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D))).to(dtype)
    batch = zoo.make_batch(3, 4, seed=3, dtype=dtype)
    capture = attach(model, body="core", sketch_size=64)
    with capture.inline(batch, verify=True) as inline:
        inline.losses(zoo.squared_error(model, batch)).mean().backward()
    start, stop = next((b.start, b.stop) for b in inline.features.space.blocks if b.name == "core.k.bias")
    rows = inline.features.values
    assert float(rows[:, start:stop].norm()) < 1e3 * torch.finfo(dtype).eps * float(rows.norm())


def test_distributed_data_parallel(tmp_path: Any) -> None:
    model = dense()
    expected = attach(model, body="core", sketch_size=32).featurize([batch_of()], zoo.squared_error)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        capture = attach(wrapped, body=model.core, sketch_size=32)
        with capture.inline(batch_of(), per_step=True, verify=True) as inline:
            inline.losses(zoo.squared_error(wrapped, batch_of())).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    error = (inline.features.values - expected.values).norm() / expected.values.norm()
    assert float(error) <= BOUND
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_of_a_step_stays_in_memory() -> None:
    """Nothing of the graph, that is, whether or not there was a backward pass."""
    model = dense()
    capture = attach(model, body="core", sketch_size=16)

    def tensors_after(steps: int) -> int:
        for k in range(steps):
            with capture.inline(batch_of()) as inline:
                losses = inline.losses(zoo.squared_error(model, batch_of()))
                if k % 2:
                    losses.sum().backward()
        del inline, losses
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated modules that are looked at
            return sum(isinstance(o, Tensor) for o in gc.get_objects())

    tensors_after(2)  # and with it what earlier tests have left
    assert tensors_after(2) == tensors_after(6)


def test_one_thread_at_a_time() -> None:
    model = dense()
    capture, found = attach(model, body="core", sketch_size=16), []

    def other() -> None:
        try:
            with capture.inline(batch_of()):
                pass
        except BodyError as error:
            found.append(str(error))

    with capture.inline(batch_of()) as inline:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        inline.losses(zoo.squared_error(model, batch_of())).sum().backward()
    assert len(found) == 1
    assert "another thread" in found[0]
    assert len(inline.features) == 3
