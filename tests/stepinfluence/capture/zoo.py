"""Small looped models, one for each way in which a parameter can meet the data.

A *core* maps ``(B, T, D)`` to ``(B, T, D)`` and is what the loop applies; :class:`Looped` puts a read-in before and a
read-out after it, both outside the body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

D, FEATURES, STEPS = 6, 5, 3
MAX_TOKENS = 8


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / max(1, *shape[-1:]) ** 0.5) if shape else nn.Parameter(torch.tensor(0.7))


class Looped(nn.Module):
    """``state <- core(state) + read_in(x)`` for ``steps`` steps."""

    def __init__(self, core: nn.Module, steps: int = STEPS) -> None:
        super().__init__()
        self.read_in = nn.Linear(FEATURES, D)
        self.core = core
        self.read_out = nn.Linear(D, 1)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        injected = self.read_in(x)
        state = injected
        for _ in range(self.steps):
            state = self.core(state) + injected
        return self.read_out(state)


def squared_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """``(B,)``: mean squared error of each example's tokens."""
    return (model(batch["x"]).squeeze(-1) - batch["y"]).square().flatten(1).mean(1)


def make_batch(size: int, tokens: int = 4, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    dtype = dtype or torch.get_default_dtype()
    generator = torch.Generator().manual_seed(1000 * seed + 10 * size + tokens)
    return {
        "x": torch.randn(size, tokens, FEATURES, generator=generator).to(dtype),
        "y": torch.randn(size, tokens, generator=generator).to(dtype),
    }


class Core(nn.Module):
    """A core from a function of its parameters: ``fn(self, state)``."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor], **parts: nn.Parameter | nn.Module | Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, state: Tensor) -> Tensor:
        return self.fn(self, state)


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: ``addmm`` on flattened tokens, the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = normal(D, D), normal(D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, D), self.weight).view(x.shape).tanh()


class HandRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)


class HandLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = normal(D), normal(D)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain + self.shift


class LoRALinear(nn.Module):
    """A frozen base layer and a trainable low-rank update, in factors or merged, as PEFT has it."""

    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(D, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, D, bias=False)})
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"], self.lora_B["default"]
        if self.merged:
            return F.linear(x, self.base.weight + 0.5 * (b.weight @ a.weight), self.base.bias).tanh()
        return (self.base(x) + 0.5 * b(a(x))).tanh()


class FusedAttention(nn.Module):
    """One weight for query, key and value, cut by ``chunk`` (the weight or its output)."""

    def __init__(self, *, chunk_weight: bool, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.chunk_weight, self.heads = chunk_weight, heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        if self.chunk_weight:
            weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, D))


class StackedExperts(nn.Module):
    """Every expert sees every token, weighted by a gate: dense mixture with stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3)
        self.experts = normal(3, D, D)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.einsum("btd,edf->btef", x, self.experts)
        return (outputs * self.gate(x).softmax(-1).unsqueeze(-1)).sum(2).tanh()


class SelectedExperts(nn.Module):
    """Experts by plain index into a stack: ``x @ P[e]``, all tokens through each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = normal(2, D, D)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.experts[0]).relu() @ self.experts[1]).tanh()


class GRULike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.update, self.candidate = nn.Linear(2 * D, D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x.roll(1, 1)], -1)
        z = torch.sigmoid(self.update(both))
        return torch.lerp(x, torch.tanh(self.candidate(both)), z)


class InPlaceResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), normal(D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden.relu_()
        out = self.down(hidden)
        out += x
        out *= self.scale
        out.view(out.shape[0], -1).clamp_(-3, 3)
        return out


class ClsToken(nn.Module):
    """A learned token put before the others by expand and cat; its output is added to all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.cls = normal(1, 1, D)
        self.mix = nn.Linear(D, D)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        token = self.cls.expand(len(x), -1, -1) if self.how == "expand" else self.cls.repeat(len(x), 1, 1)
        both = torch.cat([token, x], 1)
        both = self.mix(both.softmax(1) * both)
        return (both[:, 1:] + both[:, :1]).tanh()


class TiedEmbedding(nn.Module):
    """An embedding of the state's arg-max, and the same table as output head."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(7, D, padding_idx=padding_idx)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            # A hard choice that depends on the example's input only, not on the parameters.
            ids = (x.detach()[..., :1].sign() + x.detach()[..., 1:2].sign() * 2 + 3).long().squeeze(-1)
        logits = F.linear(x, self.table.weight)
        return F.linear(logits.softmax(-1), self.table.weight.T).tanh() + self.table(ids)


class SequenceFirst(nn.Module):
    """Works on ``(T, B, D)`` inside a batch-first model."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.position = nn.Linear(D, D), nn.LayerNorm(D), normal(MAX_TOKENS, 1, D)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        y = self.norm(self.mix(y + self.position[: len(y)]))
        return y.transpose(0, 1).tanh()


def positions(how: str) -> Core:
    """A table of positions, looked up without a batch dimension in the usual ways."""
    ways: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "arange": lambda s, x: s.table(torch.arange(x.shape[1])),
        "arange row": lambda s, x: s.table(torch.arange(x.shape[1]).unsqueeze(0)),
        "arange expanded": lambda s, x: s.table(torch.arange(x.shape[1]).expand(len(x), -1)),
        "arange repeated": lambda s, x: s.table(torch.arange(x.shape[1]).repeat(len(x), 1)),
        "cumulative": lambda s, x: s.table(torch.ones_like(x[..., 0], dtype=torch.long).cumsum(1) - 1),
        "list": lambda s, x: s.table(torch.tensor(list(range(x.shape[1])))),
        "slice": lambda s, x: s.table.weight[: x.shape[1]],
        "buffer": lambda s, x: s.table(s.ids[:, : x.shape[1]]),
        "index": lambda s, x: s.table.weight[torch.arange(x.shape[1])],
        "index_select": lambda s, x: s.table.weight.index_select(0, torch.arange(x.shape[1])),
    }
    fn = ways[how]
    return Core(
        lambda s, x: s.mix(x + fn(s, x)).tanh(),
        table=nn.Embedding(MAX_TOKENS, D),
        mix=nn.Linear(D, D),
        ids=torch.arange(MAX_TOKENS).unsqueeze(0),
    )


class StepRow(nn.Module):
    """A row of a table of loop steps, broadcast over the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.rows, self.mix, self.how = nn.Embedding(STEPS, D), nn.Linear(D, D), how
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        t = self.calls % STEPS
        self.calls += 1
        row = {
            "int": lambda: self.rows.weight[t],
            "scalar": lambda: self.rows(torch.tensor(t)),
            "one": lambda: self.rows(torch.tensor([t])),
            "full": lambda: self.rows(torch.full((len(x),), t)).unsqueeze(1),
            "long": lambda: self.rows(torch.full(x.shape[:2], t)),
        }[self.how]()
        return self.mix(x + row).tanh()


def collected(core: Any, x: Tensor) -> Tensor:
    rows = torch.zeros(x.shape[1], len(x), D, dtype=x.dtype)
    for t in range(x.shape[1]):
        rows[t] = x[:, t]
    return core.mix(rows.transpose(0, 1)).tanh()


def merged_in_place(core: Any, x: Tensor) -> Tensor:
    weight = core.w.clone()
    row = weight[0]
    weight += core.b @ core.a
    return F.linear(x, weight).tanh() + row * x


def written_table(core: Any, x: Tensor) -> Tensor:
    table = torch.zeros(7, D, dtype=x.dtype)
    table[0] = core.p
    table[1] = core.q * 2
    return (x + table[0] * table[1]).tanh()


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def with_dense(part: nn.Module, **kwargs: Any) -> nn.Module:
    return nn.Sequential(part, nn.Linear(D, D, **kwargs), nn.Tanh())


def parametrized(how: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(how(linear()), nn.Tanh())


def frozen_bias() -> nn.Module:
    layer = linear()
    layer.bias.requires_grad_(False)
    return nn.Sequential(layer, nn.Tanh())


def frozen_weight() -> nn.Module:
    layer = linear()
    layer.weight.requires_grad_(False)
    return nn.Sequential(layer, nn.Tanh())


def shared_inside() -> nn.Module:
    first, second = linear(), linear()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first)


def transformer_layer(*, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 8, batch_first=batch_first, dropout=0.0)
    if batch_first:
        return layer
    return Core(lambda s, x: s.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer)


def attention(*, batch_first: bool) -> nn.Module:
    layer = nn.MultiheadAttention(D, 2, batch_first=batch_first, add_bias_kv=False)
    if batch_first:
        return Core(lambda s, x: s.layer(x, x, x, need_weights=False)[0], layer=layer)
    return Core(lambda s, x: s.layer(*[x.transpose(0, 1)] * 3, need_weights=True)[0].transpose(0, 1), layer=layer)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: with_dense(nn.Identity()),
    "linear without bias": lambda: with_dense(nn.Identity(), bias=False),
    "linear, 4-d input": lambda: Core(
        lambda s, x: s.mix(x.view(*x.shape[:2], 2, D // 2)).flatten(2).tanh(), mix=nn.Linear(D // 2, D // 2)
    ),
    "linear, 2-d input": lambda: Core(lambda s, x: x + s.mix(x.mean(1)).tanh().unsqueeze(1), mix=linear()),
    "linear, flattened input": lambda: Core(
        lambda s, x: s.mix(x.reshape(-1, D)).view_as(x).tanh(), mix=linear()
    ),
    "linear, sequence first": SequenceFirst,
    "linear twice": lambda: Core(lambda s, x: s.mix(s.mix(x).tanh()).tanh(), mix=linear()),
    "linear with keywords": lambda: Core(
        lambda s, x: F.linear(input=x, weight=s.w, bias=s.b).tanh(), w=normal(D, D), b=normal(D)
    ),
    "frozen bias": frozen_bias,
    "frozen weight": frozen_weight,
    "shared inside the body": shared_inside,
    "mlp": lambda: nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D)),
    "x @ P": lambda: Core(lambda s, x: (x @ s.p).tanh(), p=normal(D, D)),
    "x @ P.T": lambda: Core(lambda s, x: (x @ s.p.T).tanh(), p=normal(D, D)),
    "matmul(x, P.mT)": lambda: Core(lambda s, x: torch.matmul(x, s.p.mT).tanh(), p=normal(D, D)),
    "P @ x": lambda: Core(lambda s, x: (s.p[: x.shape[1], : x.shape[1]] @ x).tanh(), p=normal(MAX_TOKENS, MAX_TOKENS)),
    "P.T @ x": lambda: Core(
        lambda s, x: (s.p[: x.shape[1], : x.shape[1]].T @ x).tanh(), p=normal(MAX_TOKENS, MAX_TOKENS)
    ),
    "x @ vector": lambda: Core(lambda s, x: x + (x @ s.p).tanh().unsqueeze(-1), p=normal(D)),
    "x @ column": lambda: Core(lambda s, x: x + (x @ s.p[:, 2]).tanh().unsqueeze(-1), p=normal(D, D)),
    "mm": lambda: Core(lambda s, x: x.flatten(0, 1).mm(s.p).view_as(x).tanh(), p=normal(D, D)),
    "einsum": lambda: Core(lambda s, x: torch.einsum("btd,df->btf", x, s.p).tanh(), p=normal(D, D)),
    "einsum heads": lambda: Core(
        lambda s, x: torch.einsum("bthd,hdf->bthf", x.view(*x.shape[:2], 2, 3), s.p).flatten(2).tanh(),
        p=normal(2, 3, 3),
    ),
    "tensordot": lambda: Core(lambda s, x: torch.tensordot(x, s.p, dims=1).tanh(), p=normal(D, D)),
    "bmm": lambda: Core(lambda s, x: torch.bmm(x, s.p.expand(len(x), -1, -1)).tanh(), p=normal(D, D)),
    "baddbmm": lambda: Core(
        lambda s, x: torch.baddbmm(s.b, x, s.p.expand(len(x), -1, -1)).tanh(), p=normal(D, D), b=normal(1, 1, D)
    ),
    "Hugging Face Conv1D": Conv1D,
    "conv1d": lambda: Core(lambda s, x: s.conv(x.mT).mT.tanh(), conv=nn.Conv1d(D, D, 3, padding=1)),
    "depthwise conv1d": lambda: Core(lambda s, x: s.conv(x.mT).mT.tanh(), conv=nn.Conv1d(D, D, 3, padding=1, groups=D)),
    "layer norm": lambda: with_dense(nn.LayerNorm(D)),
    "layer norm without bias": lambda: with_dense(nn.LayerNorm(D, bias=False)),
    "layer norm over two dimensions": lambda: Core(
        lambda s, x: s.norm(x.view(*x.shape[:2], 2, 3)).flatten(2).tanh(), norm=nn.LayerNorm((2, 3))
    ),
    "rms norm": lambda: with_dense(nn.RMSNorm(D)),
    "rms norm with eps": lambda: with_dense(nn.RMSNorm(D, eps=1e-3)),
    "functional rms norm": lambda: Core(lambda s, x: F.rms_norm(x, (D,), s.g).tanh(), g=normal(D)),
    "functional layer norm of exp": lambda: Core(
        lambda s, x: F.layer_norm(x, (D,), s.g.exp(), s.b * 2).tanh(), g=normal(D), b=normal(D)
    ),
    "group norm": lambda: Core(lambda s, x: s.norm(x.mT).mT.tanh(), norm=nn.GroupNorm(2, D)),
    "hand-written rms norm": lambda: with_dense(HandRMSNorm()),
    "hand-written layer norm": lambda: with_dense(HandLayerNorm()),
    "scalar gate": lambda: Core(lambda s, x: x + s.gate.tanh() * s.mix(x).tanh(), gate=normal(), mix=linear()),
    "plain scalar gate": lambda: Core(lambda s, x: x + s.gate * s.mix(x).tanh(), gate=normal(), mix=linear()),
    "gate of shape (1,)": lambda: Core(lambda s, x: torch.lerp(x, s.mix(x).tanh(), s.g), g=normal(1), mix=linear()),
    "per-channel scale": lambda: Core(lambda s, x: (s.scale * x - s.shift).tanh(), scale=normal(D), shift=normal(D)),
    "1 - sigmoid gate": lambda: Core(
        lambda s, x: torch.sigmoid(s.g) * x + (1 - torch.sigmoid(s.g)) * x.tanh(), g=normal(D)
    ),
    "right-hand scalar arithmetic": lambda: Core(
        lambda s, x: (s.a / (1 + x * x) - s.b).tanh(), a=normal(D), b=normal()
    ),
    "addcmul": lambda: Core(lambda s, x: torch.addcmul(x, s.a, x, value=0.5).tanh(), a=normal(D)),
    "where": lambda: Core(lambda s, x: torch.where(x > 0, s.a, x).tanh(), a=normal(D)),
    "pow": lambda: Core(lambda s, x: (x.abs() + 0.5).pow(s.a).tanh(), a=normal(D)),
    "per-head scale": lambda: Core(
        lambda s, x: (x.view(*x.shape[:2], 2, 3) * s.scale.view(1, 1, 2, 1)).flatten(2).tanh(), scale=normal(2)
    ),
    "learned (1, T, d) positions": lambda: Core(
        lambda s, x: s.mix(x + s.p[:, : x.shape[1]]).tanh(), p=normal(1, MAX_TOKENS, D), mix=linear()
    ),
    "learned (T, d) positions": lambda: Core(
        lambda s, x: s.mix(x + s.p[: x.shape[1]]).tanh(), p=normal(MAX_TOKENS, D), mix=linear()
    ),
    "expanded vector": lambda: Core(lambda s, x: s.mix(x + s.p.expand_as(x)).tanh(), p=normal(D), mix=linear()),
    "expanded row": lambda: Core(
        lambda s, x: s.mix(x + s.p[None, None].expand(*x.shape[:2], -1)).tanh(), p=normal(D), mix=linear()
    ),
    "repeated vector, changed in place": lambda: Core(
        lambda s, x: s.mix(s.p.repeat(len(x), 1).add_(x.mean(1))).tanh().unsqueeze(1) + x, p=normal(D), mix=linear()
    ),
    "cls token, expanded": lambda: ClsToken("expand"),
    "cls token, repeated": lambda: ClsToken("repeat"),
    "exp(log_a)": lambda: Core(lambda s, x: x * torch.exp(-torch.exp(s.log_a)) + x.tanh(), log_a=normal(D)),
    "weight norm": lambda: parametrized(parametrizations.weight_norm),
    "spectral norm": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "LoRA in factors": lambda: LoRALinear(merged=False),
    "LoRA merged": lambda: LoRALinear(merged=True),
    "outer product of vectors": lambda: Core(
        lambda s, x: F.linear(x, torch.outer(s.u, s.v)).tanh(), u=normal(D), v=normal(D)
    ),
    "weight of two parameters": lambda: Core(
        lambda s, x: F.linear(x, s.w * s.scale.unsqueeze(1), s.b + s.scale).tanh(),
        w=normal(D, D), scale=normal(D), b=normal(D),
    ),
    "weight in three forms": lambda: Core(
        lambda s, x: (F.linear(x, s.w) + (x @ s.w[:, 1:3]).sum(-1, keepdim=True) + x * s.w[0]).tanh(), w=normal(D, D)
    ),
    "strided pieces": lambda: Core(
        lambda s, x: (F.linear(x[..., ::2], s.w[::3, ::2]).sum(-1, keepdim=True) + x * s.w.diagonal()).tanh(),
        w=normal(D, D),
    ),
    "reshaped weight": lambda: Core(
        lambda s, x: torch.cat([F.linear(x[..., :3], s.w.view(2 * D, 3)[:3]), x[..., 3:]], -1).tanh(), w=normal(D, D)
    ),
    "fused qkv, weight chunks": lambda: FusedAttention(chunk_weight=True),
    "fused qkv, output chunks": lambda: FusedAttention(chunk_weight=False),
    "attention, batch first": lambda: attention(batch_first=True),
    "attention, sequence first": lambda: attention(batch_first=False),
    "transformer layer, batch first": lambda: transformer_layer(batch_first=True),
    "transformer layer, sequence first": lambda: transformer_layer(batch_first=False),
    "tied embedding and head": TiedEmbedding,
    "embedding with padding": lambda: TiedEmbedding(padding_idx=3),
    **{f"positions by {how}": (lambda how=how: positions(how)) for how in (
        "arange", "arange row", "arange expanded", "arange repeated", "cumulative", "list", "slice", "buffer",
        "index", "index_select",
    )},
    **{f"step row by {how}": (lambda how=how: StepRow(how)) for how in ("int", "scalar", "one", "full", "long")},
    "dense experts": StackedExperts,
    "experts by index": SelectedExperts,
    "GRU-like gates": GRULike,
    "changed in place": InPlaceResidual,
    "prelu": lambda: with_dense(nn.PReLU(D // 6)),
    "bilinear": lambda: Core(lambda s, x: s.b(x, x.roll(1, 1)).tanh(), b=nn.Bilinear(D, D, D)),
    "batch norm in eval mode": lambda: Core(lambda s, x: s.norm(x.mT).mT.tanh(), norm=nn.BatchNorm1d(D)),
    "instance norm": lambda: Core(lambda s, x: s.norm(x.mT).mT.tanh(), norm=nn.InstanceNorm1d(D, affine=True)),
    "complex filter": lambda: Core(
        lambda s, x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * torch.view_as_complex(s.f), n=D, dim=-1).tanh(),
        f=normal(D // 2 + 1, 2),
    ),
    "gru cell": lambda: Core(lambda s, x: x + s.cell(x[:, 0], x[:, 1]).unsqueeze(1), cell=nn.GRUCell(D, D)),
    "read at chosen tokens": lambda: Core(
        lambda s, x: x + s.mix(x[torch.arange(len(x)), x[..., 0].argmax(1)]).tanh().unsqueeze(1), mix=linear()
    ),
    "top tokens": lambda: Core(
        lambda s, x: x + s.mix(x.gather(1, x[..., :1].topk(2, 1).indices.expand(-1, -1, D))).tanh().mean(1, True),
        mix=linear(),
    ),
    "experts by mask": lambda: Core(
        lambda s, x: torch.where(x[..., :1] > 0, s.a(x), s.b(x)).tanh(), a=linear(), b=linear()
    ),
    "rows collected in a buffer": lambda: Core(collected, mix=linear()),
    "weight changed in place": lambda: Core(merged_in_place, w=normal(D, D), a=normal(2, D), b=normal(D, 2)),
    "table written in place": lambda: Core(written_table, p=normal(D), q=normal(D)),
    "attention with bias_kv": lambda: Core(
        lambda s, x: s.layer(x, x, x)[0], layer=nn.MultiheadAttention(D, 2, batch_first=True, add_bias_kv=True)
    ),
    "cross attention": lambda: Core(
        lambda s, x: s.layer(x, x[:, :1, :3], x[:, :1, 3:])[0],
        layer=nn.MultiheadAttention(D, 2, batch_first=True, kdim=3, vdim=3),
    ),
    "decoder layer": lambda: Core(
        lambda s, x: s.layer(x, x), layer=nn.TransformerDecoderLayer(D, 2, 8, batch_first=True, dropout=0.0)
    ),
    "sparse embedding": lambda: Core(
        lambda s, x: (x + s.table((x.detach()[..., 0] > 0).long())).tanh(), table=nn.Embedding(4, D, sparse=True)
    ),
    "dropout in eval mode": lambda: with_dense(nn.Dropout(0.5)),
    "type_as a parameter": lambda: Core(
        lambda s, x: F.linear(x.type_as(s.w).to(s.w), s.w).tanh(), w=normal(D, D)
    ),
}  # fmt: skip
