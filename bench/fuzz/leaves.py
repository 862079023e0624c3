"""Operations on every token alone: ``(x, ids) -> like x``, with ``x`` of shape ``(*lead, d)`` and ``ids (*lead)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

VOCABULARY = 12


def p(*shape: int) -> nn.Parameter:
    """A parameter that :func:`bench.fuzz.build.build` fills."""
    return nn.Parameter(torch.zeros(*shape))


class Leaf(nn.Module):
    """``x + tanh(f(x))``, ``tanh(f(x))`` or ``x * sigmoid(f(x))``: bounded, so that no loop explodes."""

    def __init__(self, node: dict[str, Any]) -> None:
        super().__init__()
        self.mode = node.get("mode", "res")

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.value(x, ids)
        if self.mode == "gate":
            return x * torch.sigmoid(y)
        return x + torch.tanh(y) if self.mode == "res" else torch.tanh(y)


class Linear(Leaf):
    """``x W^T + b`` in every form it is written in."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how, self.heads = node["how"], heads
        if self.how in ("module", "pre_hook", "forward_hook", "parameter_hook", "weight_norm"):
            self.f = nn.Linear(d, d, bias=node.get("bias", True))
        if self.how == "weight_norm":
            parametrizations.weight_norm(self.f)
        elif self.how == "forward_hook":
            self.f.register_forward_hook(lambda _m, _i, out: out * 0.5)
        elif self.how == "pre_hook":
            self.f.register_forward_pre_hook(lambda _m, i: (i[0] * 0.5,))
        elif self.how == "parameter_hook":
            mask = (torch.arange(d * d).view(d, d) % 2).double()
            self.f.weight.register_hook(lambda grad: grad * mask)
        wide = {"qkv": (3 * d, d), "glu": (2 * d, d), "heads": (heads, d // heads, d // heads)}
        self.w = p(*wide.get(self.how, (d, d)))
        self.b = p(*{"qkv": (3 * d,), "glu": (2 * d,)}.get(self.how, (d,)))
        self.v = p(d, 2)
        self.u = p(2, d)
        self.g = p(d)
        self.keep = {
            "matmul": "w", "t": "wb", "addmm": "wb", "qkv": "wb", "glu": "wb", "heads": "w", "low_rank": "vu",
            "product": "vu", "norm_in_step": "wg", "tied": "w", "einsum": "wb", "functional": "wb", "exp": "wg",
            "left": "w", "masked": "w", "bilinear": "w", "bmm": "w", "mlp": "vu", "sum_of_slices": "w",
        }.get(self.how, "")  # fmt: skip
        for name in "wbvug":
            if name not in self.keep:
                delattr(self, name)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        return FORMS[self.how](self, x)


def _heads(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("...hi,hio->...ho", x.unflatten(-1, (m.heads, -1)), m.w).flatten(-2)


def _qkv(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, m.w, m.b).chunk(3, -1)
    return q * torch.sigmoid(k) + v


def _sum_of_slices(m: Any, x: Tensor) -> Tensor:
    h = x.shape[-1] // 2
    return x[..., :h] @ m.w[:h] + F.linear(x[..., h:], m.w[:, h:])  # type: ignore[no-any-return]


def _module(m: Any, x: Tensor) -> Tensor:
    return m.f(x)  # type: ignore[no-any-return]


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(("module", "pre_hook", "forward_hook", "parameter_hook", "weight_norm"), _module),
    "functional": lambda m, x: F.linear(x, m.w, m.b),
    "matmul": lambda m, x: x @ m.w,
    "t": lambda m, x: torch.matmul(x, m.w.t()) + m.b,
    "addmm": lambda m, x: torch.addmm(m.b, x.reshape(-1, x.shape[-1]), m.w).view(x.shape),
    "einsum": lambda m, x: torch.einsum("...i,oi->...o", x, m.w) + m.b,
    "left": lambda m, x: (m.w @ x.unsqueeze(-1)).squeeze(-1),
    "bmm": lambda m, x: torch.bmm(x.reshape(1, -1, x.shape[-1]), m.w[None]).view(x.shape),
    "qkv": _qkv,
    "glu": lambda m, x: F.glu(F.linear(x, m.w, m.b), -1),
    "heads": _heads,
    "low_rank": lambda m, x: x @ m.v @ m.u,
    "mlp": lambda m, x: F.gelu(x @ m.v) @ m.u,
    "product": lambda m, x: x @ (m.v @ m.u),
    "norm_in_step": lambda m, x: F.linear(x, m.g[:, None] * m.w / m.w.norm(dim=1, keepdim=True)),
    "tied": lambda m, x: F.relu(x @ m.w) @ m.w.t(),
    "exp": lambda m, x: x * (-m.g.exp()).exp() + x @ m.w,
    "masked": lambda m, x: F.linear(x, m.w.tril()),
    "bilinear": lambda m, x: x * torch.softmax(x @ m.w, -1),
    "sum_of_slices": _sum_of_slices,
}


class Norm(Leaf):
    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.how, self.heads = node["how"], heads
        if self.how == "layer":
            self.n: nn.Module = nn.LayerNorm(d)
        elif self.how == "rms":
            self.n = nn.RMSNorm(d, eps=1e-3)
        elif self.how == "group":
            self.n = nn.GroupNorm(heads, d, eps=1e-2)
        else:
            self.w, self.b = p(d), p(d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.how in ("layer", "rms"):
            return self.n(x)  # type: ignore[no-any-return]
        if self.how == "group":
            return self.n(x.reshape(-1, x.shape[-1])).view(x.shape)  # type: ignore[no-any-return]
        if self.how == "by hand":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (1 + self.w) + self.b
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return torch.addcmul(self.b, (x - mean) / (var + 1e-2).sqrt(), self.w)


class Vector(Leaf):
    """Parameters of a row: scales, biases, decay rates, thresholds."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how = node["how"]
        self.w = p(d)
        if self.how == "prelu":
            self.w = p(1)
        if self.how == "mixture":
            self.w = p(2)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        return VECTORS[self.how](x, self.w, ids)


def _in_place(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    z = x * 1.0
    z += w
    return z


def _masked_set(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    z = x.clone()
    z[ids % 2 == 0] = w
    return z


def _schedule(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    for t in torch.tensor([0.25, 0.5, 1.0], dtype=x.dtype):  # constants, also where there are three examples
        x = torch.tanh(x + t * w)
    return x


VECTORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scale": lambda x, w, ids: x * w,
    "bias": lambda x, w, ids: x + w,
    "exp": lambda x, w, ids: x * torch.exp(-torch.exp(w)),
    "lerp": lambda x, w, ids: torch.lerp(x, x.tanh(), w.sigmoid()),
    "addcmul": lambda x, w, ids: torch.addcmul(x, w, x.sin()),
    "where": lambda x, w, ids: torch.where((ids % 3 == 0).unsqueeze(-1), w, x),
    "expand": lambda x, w, ids: x * w.expand_as(x),
    "mixture": lambda x, w, ids: w.softmax(0)[0] * x + w.softmax(0)[1] * x.sin(),
    "prelu": lambda x, w, ids: F.prelu(x, w),
    "in place": _in_place,
    "masked set": _masked_set,
    "schedule": _schedule,
    "product": lambda x, w, ids: (x @ w).unsqueeze(-1) * x.sin(),
    "like": lambda x, w, ids: x + torch.zeros_like(x).add(w),
}


class Lookup(Leaf):
    """Token embeddings, looked up anew at every step."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how = node["how"]
        self.e = nn.Embedding(VOCABULARY, d, padding_idx=0 if self.how == "padding" else None)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        w = self.e.weight
        if self.how == "getitem":
            return x + w[ids]
        if self.how == "select":
            return x + w.index_select(0, ids.flatten()).view(x.shape)
        if self.how == "one hot":
            return x + F.one_hot(ids, VOCABULARY).to(x.dtype) @ w
        if self.how == "scores":
            return x + F.linear(x, w).softmax(-1) @ w
        return x + self.e(ids)  # type: ignore[no-any-return]


class Cell(Leaf):
    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.cell = nn.GRUCell(d, d) if node["how"] == "gru" else nn.RNNCell(d, d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.cell(flat.sin(), flat).view(x.shape)  # type: ignore[no-any-return]


class Buffered(Leaf):
    """Linear with a buffer that moves in training mode."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how = node["how"]
        self.f = nn.Linear(d, d)
        if self.how == "spectral_norm":
            parametrizations.spectral_norm(self.f)
        elif self.how == "power":
            self.register_buffer("u", torch.ones(d))
        elif self.how == "ema":
            self.register_buffer("u", torch.eye(d))
        else:
            self.register_buffer("u", torch.zeros(d))
        self.u: Tensor

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        w = self.f.weight
        if self.how == "spectral_norm":
            return self.f(x)  # type: ignore[no-any-return]
        if self.how == "power":
            if self.training:
                with torch.no_grad():
                    self.u = F.normalize(w @ F.normalize(w.t() @ self.u, dim=0), dim=0)
            v = F.normalize(w.detach().t() @ self.u, dim=0)
            return F.linear(x, w / (self.u @ (w @ v)).abs().add(0.1), self.f.bias)
        if self.how == "ema":
            if self.training:
                self.u = 0.9 * self.u + 0.1 * w.detach()
            return self.f(x) + x @ self.u  # type: ignore[no-any-return]
        if self.how == "in place" and self.training:
            self.u.mul_(0.5).add_(0.05)
        elif self.how == "small" and self.training:
            self.u = self.u + 1e-4
        elif self.training:
            self.u = 0.5 * self.u + 0.05
        return self.f(x) - self.u  # type: ignore[no-any-return]


class Hooked(Leaf):
    """A hook on a tensor, which changes its gradient or takes gradients of its own in the backward pass."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.how = node["how"]
        self.f = nn.Linear(d, d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        y = x + torch.tanh(self.f(x))
        if not y.requires_grad:
            return y
        if self.how == "scale":
            y.register_hook(lambda grad: grad * 0.5)
        elif self.how == "clamp":
            y.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
        elif self.how == "grad":
            start = y.detach().requires_grad_()
            again = torch.tanh(self.f(start))
            y.register_hook(lambda grad: grad + torch.autograd.grad(again, start, grad, retain_graph=True)[0])
        elif self.how == "grad in hook":
            start, f = y.detach(), self.f

            def hook(grad: Tensor) -> Tensor:
                with torch.enable_grad():
                    z = start.clone().requires_grad_()
                    out = torch.tanh(f(z))
                return grad + 0.5 * torch.autograd.grad(out, z, grad)[0]

            y.register_hook(hook)
        return y


TOKENWISE: dict[str, type[Leaf]] = {
    "linear": Linear, "norm": Norm, "vector": Vector, "lookup": Lookup, "cell": Cell, "buffer": Buffered,
    "hook": Hooked,
}  # fmt: skip
