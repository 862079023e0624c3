"""One call sketches a layer's loop steps, within ``attach(workspace=)``: how many calls, how much memory, and right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import loops
import pytest
import torch
import zoo
from compare import compare
from stepinfluence import UnsupportedUseError, attach
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

OPERATORS = ("linear_sketch_", "linear_steps_sketch_")
B, T, D, STEPS = 4, 5, 16, 6
USE = 2 * B * T * D * 4
"""Bytes of one use of a layer of :class:`Two`: its activations and its gradients."""


class Two(nn.Module):
    """A loop of two linear layers."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.read_in, self.read_out = nn.Linear(zoo.FEATURES, D), nn.Linear(D, 1)
        self.core = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh())
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        injected = state = self.read_in(x)
        for _ in range(STEPS):
            state = state + injected
            state = checkpoint(self.core, state, use_reentrant=False) if self.checkpointed else self.core(state)
        return self.read_out(state)


class Calls(TorchDispatchMode):
    """Counts the calls of linear layers' operators, and the uses that each deals with."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("sdi_kernels::")
        if name in OPERATORS:
            self.uses.append(len(args[1]) if name == "linear_steps_sketch_" else 1)
        return func(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """The most bytes of tensors that were alive at a time, of those made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = reference, storage.nbytes()
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def calls_of(model: nn.Module, batch: Any, loss_fn: Any = zoo.squared_error, **options: Any) -> list[int]:
    per_step = options.pop("per_step", True)
    capture = attach(model, body="core", sketch_size=32, verify=False, **options)
    with Calls() as calls:
        capture.featurize([batch], loss_fn, per_step=per_step)
    return calls.uses


# --------------------------------------------------------------------------------------------------------------------
# How many calls


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("together", [1, 2, 3, 4, STEPS, 50])
def test_a_call_for_as_many_steps_as_fit(together: int, checkpointed: bool, per_step: bool) -> None:
    model = Two(checkpointed=checkpointed)
    for spare in (0, USE - 1):
        workspace = 2 * (together * USE + spare)  # two layers
        found = calls_of(model, zoo.make_batch(B, T), workspace=workspace, per_step=per_step)
        assert len(found) == 2 * math.ceil(STEPS / min(together, STEPS))
        assert sum(found) == 2 * STEPS


def test_by_default_a_call_for_each_layer() -> None:
    assert calls_of(Two(), zoo.make_batch(B, T)) == [STEPS, STEPS]
    assert calls_of(Two(), zoo.make_batch(B, T), workspace=0) == [1] * 2 * STEPS


@pytest.mark.parametrize("truncate", ["no_grad", "detach"])
def test_truncated_backpropagation_has_the_steps_that_gradients_reach(truncate: str) -> None:
    assert calls_of(loops.Injected(truncate=truncate), {**zoo.make_batch(3), "steps": 5}, loops.counted_error) == [2, 2]


def test_an_expert_has_a_call_for_all_its_steps() -> None:
    model = zoo.Looped(zoo.LAYERS["experts by mask"]())
    experts = sum(p.dim() == 2 for p in model.core.parameters())
    found = calls_of(model, zoo.make_batch(6))
    assert sum(found) > len(found)
    assert len(found) <= experts


# --------------------------------------------------------------------------------------------------------------------
# How much memory


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_waits_stays_within_the_workspace(checkpointed: bool) -> None:
    """Also where activations are computed again: what was to be forgotten is not kept, but for that much."""
    peaks = {}
    for together in (0, 2, STEPS):
        capture = attach(Two(checkpointed=checkpointed), body="core", sketch_size=8, workspace=2 * together * USE)
        batch = zoo.make_batch(B, T)
        capture.featurize([batch], zoo.squared_error)
        with Memory() as memory:
            capture.featurize([batch], zoo.squared_error)
        peaks[together] = memory.peak
    assert peaks[2] <= peaks[0] + 4 * USE
    if checkpointed:  # the test can fail: all steps take more than is allowed for two
        assert peaks[STEPS] > peaks[0] + 4 * USE


# --------------------------------------------------------------------------------------------------------------------
# What is right


class Shrinking(nn.Module):
    """Every step has half as many tokens as the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.read_in, self.read_out = nn.Linear(zoo.FEATURES, zoo.D), nn.Linear(zoo.D, 1)
        self.core = nn.Sequential(nn.Linear(zoo.D, zoo.D), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        state = self.read_in(x)
        for _ in range(3):
            state = self.core(state)
            state = state[:, ::2]
        return self.read_out(state).mean(1)


def mean_error(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]).squeeze(-1) - batch["y"].mean(1)).square()


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "plain": (Two, zoo.squared_error, {}),
    "checkpointed": (lambda: Two(checkpointed=True), zoo.squared_error, {}),
    "fewer tokens at every step": (Shrinking, mean_error, {}),
    "fft": (Two, zoo.squared_error, {"route": "fft"}),
    "direct": (Two, zoo.squared_error, {"route": "direct"}),
}
LAYERS = (
    "linear, sequence first", "linear twice", "shared inside the body", "weight in three forms", "strided pieces",
    "fused qkv, weight chunks", "LoRA in factors", "tied embedding and head", "experts by mask", "GRU-like gates",
    "changed in place",
)  # fmt: skip


def of_layer(name: str) -> Callable[[], nn.Module]:
    return lambda: zoo.Looped(zoo.LAYERS[name]())


MODELS |= {name: (of_layer(name), zoo.squared_error, {}) for name in LAYERS}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("workspace", [0, 4 * USE, 1 << 30])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_waits_is_right(name: str, workspace: int, dtype: torch.dtype) -> None:
    torch.manual_seed(len(name))
    make, loss_fn, options = MODELS[name]
    model = make().to(dtype)
    batches = [zoo.make_batch(b, 8, dtype=dtype) for b in (4, 3, 1)]
    compare(model, batches, loss_fn, workspace=workspace, exact=False, **options)


@pytest.mark.parametrize("layout", ["concat", "sum"])
def test_bits_do_not_depend_on_the_batch_before(layout: Any) -> None:
    capture = attach(Two(), body="core", sketch_size=32, workspace=5 * USE, layout=layout)
    batches = [zoo.make_batch(B, T, seed=k) for k in range(2)]
    both = capture.featurize(batches, zoo.squared_error).values
    assert torch.equal(capture.featurize(batches[1:], zoo.squared_error, first_batch=1).values, both[B:])


# --------------------------------------------------------------------------------------------------------------------
# What is changed while it waits


def doubled(write: Callable[[Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    """A hook writes to the gradient that a linear layer has been given, after that."""

    def step(core: Any, x: Tensor) -> Tensor:
        beside = x.tanh()
        if beside.requires_grad:
            beside.register_hook(write)
        result: Tensor = core.mix(x) + beside
        return result

    return step


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda g: g.mul_(2.0),
    "through .data": lambda g: g.data.mul_(2.0) is None or None,
}


@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_waits_where_hooks_may_write_to_gradients(write: str, workspace: int | None) -> None:
    torch.manual_seed(0)
    model = zoo.Looped(zoo.Core(doubled(WRITES[write]), mix=zoo.linear())).double()
    compare(model, [zoo.make_batch(3, dtype=torch.float64)], workspace=workspace)


def test_nothing_waits_where_modules_have_backward_hooks() -> None:
    model = Two()
    assert calls_of(model, zoo.make_batch(B, T)) == [STEPS] * 2
    handle = model.read_out.register_full_backward_hook(lambda *_: None)
    assert calls_of(model, zoo.make_batch(B, T)) == [1] * 2 * STEPS
    handle.remove()
    assert calls_of(model, zoo.make_batch(B, T)) == [STEPS] * 2


def written(core: Any, x: Tensor) -> Tensor:
    """A hook of autograd's node, which nothing tells of, writes to the gradient that a linear layer has been given."""

    def write(grads: tuple[Tensor, ...]) -> None:
        grads[0].mul_(2.0)

    beside = x.tanh()
    if beside.grad_fn is not None:
        beside.grad_fn.register_prehook(write)
    result: Tensor = core.mix(x) + beside
    return result


def test_a_gradient_that_is_changed_in_place_is_refused() -> None:
    torch.manual_seed(0)
    model, batch = zoo.Looped(zoo.Core(written, mix=zoo.linear())), zoo.make_batch(3)
    with pytest.raises(UnsupportedUseError, match=r"core.mix.weight.*changed in place.*workspace=0") as caught:
        attach(model, body="core", sketch_size=1 << 12).featurize([batch], zoo.squared_error)
    assert "\n" not in str(caught.value)


def test_a_use_on_another_stream_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was used on may be overwritten there before the others are sketched."""
    monkeypatch.setattr("stepinfluence.capture.recording.waiting.stream_of", lambda tensor: object())
    assert calls_of(Two(), zoo.make_batch(B, T)) == [1] * 2 * STEPS


@pytest.mark.parametrize("value", [-1, 1.5, True, "8M"])
def test_workspace_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^workspace: got .*number of bytes"):
        attach(Two(), body="core", workspace=value)
