"""Operations along an example's tokens: ``(x, ids) -> like x``, ``x (rows, tokens, d)`` and ``ids (rows, tokens)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.fuzz.leaves import Leaf, p

LONGEST = 16
"""No batch is wider than this, so that parameters with a row per position suffice."""


class Attention(Leaf):
    """Self-attention, with padding masked."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.how, self.heads = node["how"], heads
        if self.how.startswith("module"):
            self.f: nn.Module = nn.MultiheadAttention(d, heads, batch_first=self.how == "module")
        else:
            self.w, self.o = p(3 * d, d), p(d, d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        masked = (ids == 0) & (ids > 0).any(-1, keepdim=True)  # a row that is all padding attends to itself
        if self.how == "module":
            return x + self.f(x, x, x, key_padding_mask=masked, need_weights=False)[0]  # type: ignore[no-any-return]
        if self.how == "module, tokens first":
            y = x.transpose(0, 1)
            y = self.f(y, y, y, key_padding_mask=masked)[0]
            return x + y.transpose(0, 1)  # type: ignore[no-any-return]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in F.linear(x, self.w).chunk(3, -1))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=~masked[:, None, None])
        elif self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "heads in batch":
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (len(x), -1))
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(masked[:, None, None], -30.0)
            y = scores.softmax(-1) @ v
        return x + y.transpose(1, 2).flatten(2) @ self.o


class Convolution(Leaf):
    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how = node["how"]
        if self.how == "causal":
            self.f = nn.Conv1d(d, d, 2)
        elif self.how == "unfolded":
            self.w = p(d, 3 * d)
        elif self.how == "functional":
            self.w = p(d, d, 3)
        else:
            self.f = nn.Conv1d(d, d, 3, padding=1, groups=d if self.how == "depthwise" else 1)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.how == "causal":
            return self.f(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)  # type: ignore[no-any-return]
        if self.how == "unfolded":
            return F.linear(F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2), self.w)
        if self.how == "functional":
            return F.conv1d(x.transpose(1, 2), self.w, padding=1).transpose(1, 2)
        return self.f(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Positions(Leaf):
    """Parameters with a row for every position."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__(node)
        self.how = node["how"]
        if self.how == "mix":
            self.w = p(LONGEST, LONGEST)
        elif self.how == "prefix":
            self.w = p(1, d)
        elif self.how == "generated":
            self.w = p(d, d * d)
        elif self.how == "channels":
            self.n = nn.GroupNorm(1, d, eps=1e-2)
        elif self.how == "module":
            self.e = nn.Embedding(LONGEST, d)
        else:
            self.w = p(LONGEST, d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        rows, tokens, d = x.shape
        if self.how == "module":
            return x + self.e(torch.arange(tokens))  # type: ignore[no-any-return]
        if self.how == "module, expanded":
            return x + F.embedding(torch.arange(tokens).expand(rows, tokens), self.w)
        if self.how == "mix":
            return torch.einsum("ij,bjd->bid", self.w[:tokens, :tokens].tril(), x)
        if self.how == "prefix":
            y = torch.cat([self.w.expand(rows, 1, d), x], 1)
            return (y.cumsum(1) * 0.3)[:, 1:]
        if self.how == "generated":
            return torch.bmm(x, (x.mean(1) @ self.w).view(rows, d, d))
        if self.how == "channels":
            return self.n(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        return x + self.w[:tokens]


class Recurrent(Leaf):
    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.f = {"gru": nn.GRU, "lstm": nn.LSTM}[node["how"]](d, d, batch_first=True)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.f(x)[0]  # type: ignore[no-any-return]


class Plain(Leaf):
    """Without parameters: what moves information from token to token between those that have some."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.how = node["how"]

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.how == "mean":
            return x + x.mean(1, keepdim=True)
        if self.how == "cumsum":
            return x + 0.3 * x.cumsum(1)
        if self.how == "roll":
            return x.roll(1, 1)
        return x.flip(1)


class Mixing(Leaf):
    """Makes the examples of a batch influence each other; a batch of one is left almost as it is."""

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__({"mode": "none"})
        self.how = node["how"]
        self.f = nn.BatchNorm1d(d, eps=1e-2) if self.how == "batch norm" else nn.Linear(d, d)

    def value(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.how == "batch norm":
            return x + self.f(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        y = torch.tanh(self.f(x))
        if self.how == "mean":
            return x + y.mean(0, keepdim=True)
        if self.how == "flip":
            return x + y.flip(0)
        if self.how == "roll":
            return x + 0.5 * torch.roll(y, 1, 0)
        if self.how == "attention":
            z = y.transpose(0, 1)
            return x + F.scaled_dot_product_attention(z, z, z).transpose(0, 1)
        if self.how == "maximum":
            return x + y.amax(0, keepdim=True)
        if self.how == "cumsum":
            return x + y.cumsum(0)
        return x + y.softmax(0)


SEQUENTIAL: dict[str, type[Leaf]] = {
    "attention": Attention, "convolution": Convolution, "positions": Positions, "recurrent": Recurrent,
    "plain": Plain, "mixing": Mixing,
}  # fmt: skip
