"""Looped models written here: one for each way of using parameters whose cost is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 16


@dataclass(frozen=True)
class Task:
    """A model and a batch.

    Attributes:
        body: names of the loop's modules.
        loss: ``loss(model, batch) -> (B,)``.
    """

    model: nn.Module
    batch: Any
    body: list[str]
    loss: Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        asked: what is asked of the capture.
        make: the task, small (compared with exact gradients) or large (timed).
        packages: that it needs, by the names they are installed by.
    """

    name: str
    asked: str
    make: Callable[[bool], Task]
    packages: tuple[str, ...] = ()


class Body(nn.Module):
    """A function of a state and of parts of this module."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Looped(nn.Module):
    """``state <- core(state) + read_in(x)``, four times."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.read_in, self.core, self.read_out = nn.Linear(FEATURES, width), core, nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = injected = self.read_in(x)
        for _ in range(4):
            state = self.core(state) + injected
        out: Tensor = self.read_out(state)
        return out


def squared_error(model: Any, batch: dict[str, Tensor]) -> Tensor:
    losses: Tensor = (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean(1)
    return losses


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def mlp(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


def heads(d: int) -> nn.Module:
    """A matrix for each of eight heads."""
    return Body(
        lambda s, x: torch.einsum("bthk,hkj->bthj", x.unflatten(-1, (8, -1)), s.w).flatten(2).tanh(),
        w=normal(8, d // 8, d // 8),
    )


def projections(d: int) -> nn.Module:
    """Into heads and out of them, as attention is often written."""
    return Body(
        lambda s, x: torch.einsum("bthk,hko->bto", torch.einsum("btd,dhk->bthk", x, s.w).tanh(), s.v),
        w=normal(d, 8, d // 8),
        v=normal(8, d // 8, d),
    )


def convolution(**options: Any) -> Callable[[int], nn.Module]:
    def make(d: int) -> nn.Module:
        given = {k: d if v == "width" else v for k, v in options.items()}
        return Body(lambda s, x: s.conv(x.transpose(1, 2)).transpose(1, 2).tanh(), conv=nn.Conv1d(d, d, 3, **given))

    return make


def cell(d: int) -> nn.Module:
    return Body(lambda s, x: s.cell(x.flatten(0, 1), x.flatten(0, 1)).view_as(x), cell=nn.GRUCell(d, d))


def layer(kind: Any) -> Callable[[int], nn.Module]:
    return lambda d: Body(lambda s, x: s.layer(x)[0], layer=kind(d, d, batch_first=True))


def routed(s: Any, x: Tensor) -> Tensor:
    """Each token to one of four experts."""
    flat = x.flatten(0, 1)
    weight, choice = s.gate(flat).softmax(-1).max(-1)
    out = torch.zeros_like(flat)
    for k, expert in enumerate(s.experts):
        index = (choice == k).nonzero().squeeze(1)
        out = out.index_add(0, index, expert(flat[index]))
    return (out * weight.unsqueeze(-1)).view_as(x)


def experts(d: int) -> nn.Module:
    return Body(routed, gate=nn.Linear(d, 4), experts=nn.ModuleList(mlp(d) for _ in range(4)))


def gated(d: int) -> nn.Module:
    """A block with a gate, as in most recent language models."""
    return Body(
        lambda s, x: x + s.out(F.silu(s.gate(s.norm(x))) * s.up(s.norm(x))),
        norm=nn.RMSNorm(d),
        gate=nn.Linear(d, 2 * d, bias=False),
        up=nn.Linear(d, 2 * d, bias=False),
        out=nn.Linear(2 * d, d, bias=False),
    )


class Unseen(torch.autograd.Function):
    """The identity, where owners cannot be followed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def unseen(d: int) -> nn.Module:
    return Body(lambda s, x: s.mlp(Unseen.apply(x)), mlp=mlp(d))


def own(name: str, asked: str, core: Callable[[int], nn.Module]) -> Case:
    def make(large: bool) -> Task:
        batch, tokens, width = (16, 64, 256) if large else (4, 6, 16)
        torch.manual_seed(0)
        given = {"x": torch.randn(batch, tokens, FEATURES), "y": torch.randn(batch, tokens)}
        return Task(Looped(core(width), width).eval(), given, ["core"], squared_error)

    return Case(name, asked, make)


CASES = [
    own("perceptron", "linear layers", mlp),
    own("gated block", "RMSNorm and three linear layers", gated),
    own("head matrices", "einsum with a matrix for each head", heads),
    own("head projections", "einsum into heads and out of them", projections),
    own("convolution", "`conv1d`", convolution(padding=1)),
    own("depthwise convolution", "`conv1d`, a group for each channel", convolution(padding=1, groups="width")),
    own("GRU cell", "`nn.GRUCell` on flattened tokens", cell),
    own("GRU", "`nn.GRU` over tokens", layer(nn.GRU)),
    own("LSTM", "`nn.LSTM` over tokens", layer(nn.LSTM)),
    own("routed experts", "each token to one of four perceptrons", experts),
    own("custom function", "owners found by gradients", unseen),
]
