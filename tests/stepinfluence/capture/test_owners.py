"""Whose the rows are: followed in any order and layout, proved at the losses, else found by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import LayoutError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Core, D, linear, normal

SIZES = [(3, 4), (4, 4), (2, 6), (1, 3), (5, 5), (6, 2)]


def batches(*sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    return [zoo.make_batch(b, t, seed=k, dtype=torch.float64) for k, (b, t) in enumerate(sizes)]


def order_of(x: Tensor) -> Tensor:
    return x.detach()[:, 0, 0].argsort()


def buckets(s: Any, x: Tensor) -> Tensor:
    """The even examples first, then the odd, one part after the other."""
    parts = [s.mix(x[k::2]) for k in range(2) if len(x[k::2])]
    out = torch.empty_like(x)
    for k, part in enumerate(parts):
        out[k::2] = part
    return out.tanh()


def capacity(s: Any, x: Tensor) -> Tensor:
    """Tokens in slots of two experts whose matrices are stacked; a slot that stays empty is nobody's."""
    flat = x.flatten(0, 1)
    expert = (flat.detach()[:, 0] > 0).long()
    place = torch.zeros_like(expert)
    for e in range(2):
        place[expert == e] = torch.arange(int((expert == e).sum()))
    slots = flat.new_zeros(2, len(flat), D)
    slots[expert, place] = flat
    out = torch.einsum("ecd,edf->ecf", slots, s.w) + s.b[:, None]
    return out[expert, place].view_as(x).tanh()


def assigned(s: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] = s.p
    y[x.detach()[..., 0] > 0] = s.q
    return y.tanh()


def custom(s: Any, x: Tensor) -> Tensor:
    """Through an operation that has no rule of its own."""
    return s.mix(torch.fft.ifft(torch.fft.fft(x)).real.flip(0)).flip(0).tanh()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tokens first, flattened": lambda: Core(
        lambda s, x: s.mix(x.mT.mT.transpose(0, 1).reshape(-1, D)).view(x.shape[1], -1, D).transpose(0, 1).tanh(),
        mix=linear(),
    ),
    "one row of all tokens": lambda: Core(lambda s, x: s.mix(x.reshape(1, -1, D)).view_as(x).tanh(), mix=linear()),
    "sorted examples": lambda: Core(
        lambda s, x: s.mix(x[order_of(x)])[order_of(x).argsort()].tanh(), mix=linear()
    ),
    "stacked in Python": lambda: Core(
        lambda s, x: torch.stack(s.mix(torch.stack([x[i] for i in order_of(x).tolist()])).unbind()[::-1])
        .flip(0)[order_of(x).argsort()].tanh(), mix=linear()
    ),
    "one example after the other": lambda: Core(
        lambda s, x: torch.cat([s.mix(x[i : i + 1]) for i in range(len(x))]).tanh(), mix=linear()
    ),
    "two streams": lambda: Core(
        lambda s, x: torch.mul(*s.mix(torch.cat([x, x.flip(1)])).chunk(2)).tanh(), mix=linear()
    ),
    "buckets": lambda: Core(buckets, mix=linear()),
    "slots of experts": lambda: Core(capacity, w=normal(2, D, D), b=normal(2, D)),
    "parameters written in place": lambda: Core(assigned, p=normal(D), q=normal(D)),
    "table by list": lambda: Core(
        lambda s, x: (x + s.t(torch.tensor(list(range(x.shape[1]))))).tanh(), t=nn.Embedding(8, D)
    ),
    "LSTM": lambda: Core(lambda s, x: s.r(x)[0], r=nn.LSTM(D, D, batch_first=True)),
    "GRU, two layers, both ways": lambda: Core(
        lambda s, x: s.r(x)[0], r=nn.GRU(D, D // 2, 2, batch_first=True, bidirectional=True)
    ),
    "GRU cell on flattened tokens": lambda: Core(
        lambda s, x: s.c(*[x.flatten(0, 1)] * 2).view_as(x), c=nn.GRUCell(D, D)
    ),
    "grouped convolution": lambda: Core(
        lambda s, x: F.conv1d(x.mT, s.k, s.v, padding="same", dilation=2, groups=2).mT.tanh(),
        k=normal(D, D // 2, 3), v=normal(D),
    ),
    "heads by einsum": lambda: Core(
        lambda s, x: torch.einsum("bthe,hef->bthf", x.unflatten(-1, (2, -1)), s.w).flatten(-2).tanh(),
        w=normal(2, D // 2, D // 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_followed(name: str) -> None:
    torch.manual_seed(len(name))
    assert compare(zoo.Looped(MODELS[name]()).double(), batches(*SIZES)).capture.owners == "followed"


@pytest.mark.parametrize("name", ["sorted examples", "two streams", "buckets", "LSTM", "heads by einsum"])
def test_found_where_they_are_not_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepinfluence.capture.found.followed_to", lambda *_: False)
    torch.manual_seed(len(name))
    assert compare(zoo.Looped(MODELS[name]()).double(), batches((3, 4), (4, 4))).capture.owners == "found"


def test_an_operation_without_a_rule() -> None:
    torch.manual_seed(1)
    assert compare(zoo.Looped(Core(custom, mix=linear())).double(), batches((3, 4), (4, 4))).capture.owners == "found"


def test_a_batch_that_mixes_after_many_that_did_not() -> None:
    """Nothing is trusted because an earlier batch was right."""
    core = Core(lambda s, x: s.mix(x if len(x) != 3 else x + 0.1 * x.roll(1, 0)).tanh(), mix=linear())
    capture = attach(zoo.Looped(core).double(), body="core", sketch_size=16, verify=False)
    capture.featurize(batches((4, 4), (2, 4), (5, 3)), zoo.squared_error)
    with pytest.raises(LayoutError):
        capture.featurize(batches((4, 4), (2, 4), (3, 4)), zoo.squared_error)


def test_losses_in_another_order_are_refused() -> None:
    capture = attach(zoo.Looped(linear()).double(), body="core", sketch_size=16)
    with pytest.raises(LayoutError, match="in the order of the batch"):
        capture.featurize(batches((4, 4)), lambda model, batch: zoo.squared_error(model, batch).flip(0))


class MixedOnTheWayBack(torch.autograd.Function):
    """Each row by itself on the way there; on the way back, from the second use on, a little of every row in each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, much: float) -> Tensor:
        ctx.much = much
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad + ctx.much * grad.mean(0), None


@pytest.mark.parametrize("place", ["between uses", "at the loss"])
def test_a_custom_function_is_never_followed(place: str) -> None:
    """The first batch is right, and was verified; the second is not, and must not pass for followed."""
    batches = [zoo.make_batch(4, 4), zoo.make_batch(4, 5)]

    def forward(core: Any, x: Tensor) -> Tensor:
        y = core.mix(x)
        return MixedOnTheWayBack.apply(y, 0.1 * (x.shape[1] == 5)) if place == "between uses" else y

    def loss(model: Any, batch: Any) -> Tensor:
        losses = zoo.squared_error(model, batch)
        return MixedOnTheWayBack.apply(losses, 0.1 * (batch["x"].shape[1] == 5)) if place == "at the loss" else losses

    capture = attach(zoo.Looped(zoo.Core(forward, mix=zoo.linear())), body="core", sketch_size=16)
    capture.featurize(batches[:1], loss)
    assert capture.owners == "found"
    with pytest.raises(LayoutError, match="changes with the losses of other examples"):
        capture.featurize(batches, loss)


def folded_places(core: Any, x: Tensor) -> Tensor:
    """Examples beside each other along the places of a convolution that looks at one place at a time."""
    wide = x.reshape(1, -1, D).transpose(1, 2)
    return core.conv(wide).transpose(1, 2).view_as(x).tanh()


def strided_places(core: Any, x: Tensor) -> Tensor:
    """Windows of one example's tokens each: as wide as an example has tokens, and as far apart."""
    wide = x.reshape(1, -1, D).transpose(1, 2)
    return x + core.wide(wide).transpose(1, 2).reshape(len(x), 1, D).tanh()


@pytest.mark.parametrize("groups", [1, 2, D])
def test_convolutions_over_examples_side_by_side(groups: int) -> None:
    torch.manual_seed(12)
    one = Core(folded_places, conv=nn.Conv1d(D, D, 1, groups=groups))
    assert compare(zoo.Looped(one).double(), batches((3, 4), (4, 3), (1, 5))).capture.owners == "followed"
    windows = Core(strided_places, wide=nn.Conv1d(D, D, 4, stride=4, groups=groups))
    assert compare(zoo.Looped(windows).double(), batches((3, 4), (5, 4), (1, 4))).capture.owners == "followed"
