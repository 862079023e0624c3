"""What calls do to owners is recalled where all that decides it is the same, and worked out anew where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import attach
from stepinfluence.capture.body.sources import ModelTensors, Provenance
from stepinfluence.capture.body.targets import as_matrix, make_targets
from stepinfluence.capture.owners import RULES, Follower, Memories, Memory
from stepinfluence.capture.owners.memory import MOST_SIZES
from stepinfluence.capture.recording.dense import DenseSink
from stepinfluence.capture.uses.recall import Recall
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Core, D, linear, normal


def batches(*seeds: int, batch: int = 4, tokens: int = 4) -> list[dict[str, Tensor]]:
    """Of one shape, so that nothing but what they hold tells them apart."""
    return [zoo.make_batch(batch, tokens, seed=seed, dtype=torch.float64) for seed in seeds]


def by_values(s: Any, x: Tensor) -> Tensor:
    order = x.detach()[:, 0, 0].argsort()
    return s.mix(x[order])[order.argsort()].tanh()


def in_python(s: Any, x: Tensor) -> Tensor:
    order = x.detach()[:, 0, 0].argsort().tolist()
    out = s.mix(torch.stack([x[i] for i in order]))
    return torch.stack([out[order.index(i)] for i in range(len(x))]).tanh()


def rolled(s: Any, x: Tensor) -> Tensor:
    by = int(x.detach()[0, 0, 0] > 0) + int(x.detach()[-1, 0, 0] > 0)
    return s.mix(x.roll(by, 0)).roll(-by, 0).tanh()


def masked(s: Any, x: Tensor) -> Tensor:
    keep = x.detach()[..., 0] > 0
    out = x * 1
    out[keep] = s.mix(x[keep])
    return out.tanh()


def unpadded(s: Any, x: Tensor) -> Tensor:
    lengths = (x.detach()[..., 0] > 0).sum(1).clamp(min=1).tolist()
    flat = s.mix(torch.cat([x[i, :n] for i, n in enumerate(lengths)]))
    parts = flat.split(lengths)
    return torch.stack([F.pad(p, (0, 0, 0, x.shape[1] - len(p))) for p in parts]).tanh() + x


def sorted_rows(s: Any, x: Tensor) -> Tensor:
    _, order = x.detach()[:, 0, :1].sort(0)
    out = s.mix(x.gather(0, order[:, None].expand_as(x)))
    return torch.zeros_like(x).scatter(0, order[:, None].expand_as(x), out).tanh()


def routed(s: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    choice, out = (flat.detach()[:, 0] > 0).long(), torch.zeros_like(flat)
    for k in range(2):
        index = (choice == k).nonzero().squeeze(1)
        out = out.index_add(0, index, flat[index] @ s.w[k])
    return out.view_as(x).tanh()


def in_place(s: Any, x: Tensor) -> Tensor:
    y = F.relu(s.mix(x), inplace=True) + 0.1
    y[x.detach()[..., 0] > 0] *= 2
    return F.dropout(y, 0.5, training=False).tanh()


CORES: dict[str, Callable[[], nn.Module]] = {
    "sorted by an index": lambda: Core(by_values, mix=linear()),
    "sorted in Python": lambda: Core(in_python, mix=linear()),
    "rolled": lambda: Core(rolled, mix=linear()),
    "mask": lambda: Core(masked, mix=linear()),
    "padding taken out by slices": lambda: Core(unpadded, mix=linear()),
    "sort and scatter": lambda: Core(sorted_rows, mix=linear()),
    "routed to a stack": lambda: Core(routed, w=normal(2, D, D)),
    "in place, here and there": lambda: Core(in_place, mix=linear()),
}


@pytest.mark.parametrize("name", CORES)
def test_what_the_data_decide_is_looked_at_in_every_batch(name: str) -> None:
    torch.manual_seed(len(name))
    compare(zoo.Looped(CORES[name](), steps=2).double(), batches(1, 2, 3))


def test_a_batch_in_order_first() -> None:
    """What was learnt from examples in order must not be recalled for those that are not."""
    one, other = batches(1, 2)
    order = one["x"][:, 0, 0].argsort()
    compare(zoo.Looped(CORES["sorted in Python"]()).double(), [{k: v[order] for k, v in one.items()}, other])


def test_the_second_batch_of_a_shape_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[Any] = []
    follow = Follower.follow

    def counting(self: Follower, func: Any, *args: Any, **kwargs: Any) -> None:
        followed.append(func)
        follow(self, func, *args, **kwargs)

    monkeypatch.setattr(Follower, "follow", counting)
    parts = {"a": linear(), "n": nn.LayerNorm(D), "b": linear()}
    core = Core(lambda s, x: s.b(F.gelu(s.n(s.a(x))).flatten(0, 1)).view_as(x), **parts)
    capture = attach(zoo.Looped(core).double(), body="core", sketch_size=16, verify=False)
    for number, batch in enumerate(batches(1, 2, 3)):
        followed.clear()
        capture.featurize([batch], zoo.squared_error)
        assert bool(followed) == (number == 0), followed
    capture.featurize(batches(4, tokens=5), zoo.squared_error)
    assert followed


def recall(memory: Memory) -> tuple[Recall, Follower, nn.Parameter, Tensor]:
    """With a target and a buffer that it knows."""
    parameter, model = nn.Parameter(torch.randn(3, 3)), nn.Module()
    model.register_parameter("w", parameter)
    model.register_buffer("c", torch.randn(3, 3))
    targets = make_targets({"w": parameter}, sketch_size=4, hashing="balanced", seed=0)
    provenance, follower = Provenance(ModelTensors(model, targets)), Follower(RULES, 3, memory)
    return Recall(provenance, follower), follower, parameter, model.c


def test_keys_hold_all_that_decides() -> None:
    memory = Memory()
    it, follower, w, c = recall(memory)
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    follower.note(x, memory.along_dim((3, 3), 0, x.device), tapped=False)
    follower.note(y, memory.along_dim((3, 3), 1, y.device), tapped=False)
    strong = torch.randn(3, 3, requires_grad=True)
    follower.note(strong, memory.along_dim((3, 3), 0, x.device), tapped=True)
    calls = {
        "dim 0": (torch.sum, (x, 0), {}),
        "dim False": (torch.sum, (x, False), {}),
        "dim 1": (torch.sum, (x, 1), {}),
        "all": (torch.sum, (x,), {}),
        "keeping it": (torch.sum, (x, 0), {"keepdim": True}),
        "other owners": (torch.sum, (y, 0), {}),
        "in a list": (torch.sum, (x, [0]), {}),
        "gradients": (torch.sum, (strong, 0), {}),
        "no owners": (torch.sum, (torch.randn(3, 3), 0), {}),
        "a constant": (torch.sum, (c, 0), {}),
        "dtype": (torch.sum, (torch.randn(3, 3).double(), 0), {}),
        "shape": (torch.sum, (torch.randn(3, 4), 0), {}),
        "other function": (torch.mean, (x, 0), {}),
        "in parts": (Tensor.split, (x, [1, 2]), {}),
        "in other parts": (Tensor.split, (x, [2, 1]), {}),
        "with a parameter": (F.linear, (x, w), {}),
        "with none": (F.linear, (x, c), {}),
        "a slice": (Tensor.__getitem__, (x, slice(0, 2)), {}),
        "another slice": (Tensor.__getitem__, (x, slice(1, 3)), {}),
    }
    keys = {name: it.key(*call) for name, call in calls.items()}
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)
    with torch.no_grad():
        assert it.key(torch.sum, (x, 0), {}) != keys["dim 0"]
    assert it.key(torch.sum, (x, 0), {}) == keys["dim 0"]


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def test_what_is_not_recalled() -> None:
    memory = Memory()
    it, follower, *_ = recall(memory)
    x = torch.randn(3, 3)
    index = torch.tensor([2, 0, 1])
    leaf = torch.randn(3, 3, requires_grad=True)
    custom: Tensor = Identity.apply(leaf)  # type: ignore[no-untyped-call]
    follower.note(custom, memory.along_dim((3, 3), 0, x.device), tapped=True)
    for func, args, kwargs in (
        (Tensor.__getitem__, (x, index), {}),
        (torch.index_select, (x, 0, index), {}),
        (torch.sort, (x,), {}),
        (torch.add, (x, x), {"out": torch.empty(3, 3)}),
        (Tensor.add_, (x, x), {}),
        (F.relu, (x, True), {}),
        (F.dropout, (x,), {"inplace": True}),
        (Tensor.repeat_interleave, (x, index), {}),
        (Tensor.item, (x[0, 0],), {}),
        (torch.exp, (custom,), {}),
        (torch.exp, (leaf.exp(),), {}),  # made out of sight
        (torch.fft.fft, (x,), {}),
    ):
        assert it.key(func, args, kwargs) is None, func
    made_by_an_index = follower.memory.along_dim((3, 3), 0, x.device).map((3, 3), lambda ends, _: ends[index])
    follower.note(x, made_by_an_index, tapped=False)
    assert it.key(torch.exp, (x,), {}) is None


def test_memories_are_of_one_batch_size_and_do_not_grow_for_ever() -> None:
    memories = Memories()
    first = memories.of(4, True)
    assert memories.of(4, True) is first
    assert memories.of(4, False) is not first
    for size in range(5, 5 + MOST_SIZES):
        memories.of(size, True)
    assert memories.of(4, True) is not first


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)), ((7,), (1, 7)), ((3, 5), (3, 5)), ((64, 32, 3), (64, 96)), ((64, 1, 3), (64, 3)),
        ((8, 16, 3, 3), (8, 144)), ((4, 32, 64), (128, 64)), ((32, 4, 8), (32, 32)), ((4, 8, 32), (32, 32)),
        ((2, 3, 4, 5), (6, 20)), ((4, 32, 8, 32), (128, 256)),
    ],
)  # fmt: skip
def test_the_matrix_of_a_parameter(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert as_matrix(shape) == matrix


def test_experts_in_one_parameter_are_linear_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient of an expert's matrix is formed for an example."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(DenseSink, "dense", forbidden)
    torch.manual_seed(0)
    capture = attach(zoo.Looped(CORES["routed to a stack"]()).double(), body="core", sketch_size=16)
    capture.featurize(batches(1), zoo.squared_error)
