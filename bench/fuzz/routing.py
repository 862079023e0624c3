"""Routed experts, in the ways in which they are written; and routing over depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.fuzz.layouts import Inner
from bench.fuzz.leaves import p


class Route(nn.Module):
    """Every token goes to one expert of ``experts`` (or two): ``x (*lead, d), ids (*lead) -> (*lead, d)``.

    ``by``: ``ids`` (the token's number decides), ``gate`` (a learned gate, whose weight scales the result), ``two``
    (the same with the two best). ``skip``: experts without tokens are not called.
    """

    def __init__(self, d: int, heads: int, node: dict[str, Any]) -> None:
        super().__init__()
        self.how, self.by, self.skip, self.count = node["how"], node["by"], node["skip"], node["experts"]
        if self.how in STACKED:
            self.w = p(self.count, d, d)
        else:
            self.experts = nn.ModuleList([nn.Linear(d, d) for _ in range(self.count)])
        if self.by != "ids":
            self.gate = nn.Linear(d, self.count, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        flat, numbers = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
        if self.by == "ids":
            out = self.dispatch(flat, numbers % self.count)
        else:
            weights, chosen = self.gate(flat).softmax(-1).topk(2 if self.by == "two" else 1, -1)
            out = torch.zeros_like(flat)
            for k in range(chosen.shape[1]):
                out = out + self.dispatch(flat, chosen[:, k]) * weights[:, k : k + 1]
        return x + out.view(x.shape)

    def dispatch(self, x: Tensor, chosen: Tensor) -> Tensor:
        """``(N, d), (N) -> (N, d)``: every row through its expert."""
        if self.how == "gathered weights":
            return torch.tanh(torch.einsum("ni,nio->no", x, self.w[chosen]))
        if self.how == "all":
            one_hot = F.one_hot(chosen, self.count).to(x.dtype)
            return torch.einsum("ne,neo->no", one_hot, torch.tanh(torch.einsum("ni,eio->neo", x, self.w)))
        if self.how in ("bmm", "einsum"):
            return self.with_capacity(x, chosen)
        if self.how == "sorted":
            order = torch.argsort(chosen, stable=True)
            sizes = torch.bincount(chosen, minlength=self.count).tolist()
            y = torch.cat(
                [self.one(e, part) for e, part in enumerate(x[order].split(sizes)) if len(part) or not self.skip]
            )
            return y[torch.argsort(order)]
        out = torch.zeros_like(x)
        for e in range(self.count):
            mask = chosen == e
            tokens = torch.where(mask)[0]
            if self.skip and not len(tokens):
                continue
            if self.how == "mask":
                out[mask] = self.one(e, x[mask])
            elif self.how == "index_add_":
                out.index_add_(0, tokens, self.one(e, x[tokens]))
            elif self.how == "index_put":
                out = out.index_put((tokens,), self.one(e, x.index_select(0, tokens)))
            elif self.how == "number as tensor":
                number = torch.tensor(e)
                out.index_add_(0, tokens, torch.tanh(F.linear(x[tokens], self.w[number])))
            elif self.how == "unbind":
                out = out.index_add(0, tokens, torch.tanh(x[tokens] @ self.w.unbind(0)[e]))
            elif self.how == "weighted":
                out = out + self.one(e, x) * mask[:, None]
            else:
                out = out.index_add(0, tokens, self.one(e, x[tokens]))
        return out

    def one(self, e: int, x: Tensor) -> Tensor:
        if self.how in STACKED:
            return torch.tanh(F.linear(x, self.w[e]))
        return torch.tanh(self.experts[e](x))

    def with_capacity(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Tokens in ``(experts, capacity, d)``, with room for all of them."""
        one_hot = F.one_hot(chosen, self.count)
        place = ((one_hot.cumsum(0) - 1) * one_hot).sum(1)
        if self.how == "bmm":
            buffer = x.new_zeros(self.count, len(x), x.shape[-1])
            buffer[chosen, place] = x
            return torch.tanh(torch.bmm(buffer, self.w))[chosen, place]
        dispatch = one_hot.to(x.dtype)[:, :, None] * F.one_hot(place, len(x)).to(x.dtype)[:, None]
        y = torch.tanh(torch.einsum("ecd,edf->ecf", torch.einsum("nec,nd->ecd", dispatch, x), self.w))
        return torch.einsum("nec,ecf->nf", dispatch, y)


STACKED = ("gathered weights", "all", "bmm", "einsum", "number as tensor", "unbind", "stacked")


def over_depth(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    """Only half of every example's tokens go through what is inside: those whose first feature is largest."""
    rows, tokens, _ = x.shape
    best = x[..., 0].topk(max(1, tokens // 2), 1).indices.sort(1).values
    if node["how"] == "gather":
        index = best[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, inner(x.gather(1, index), ids.gather(1, best)))
    if node["how"] == "pairs":
        which = torch.arange(rows)[:, None]
        out = x.clone()
        out[which, best] = inner(x[which, best], ids[which, best])
        return out
    flat = (torch.arange(rows)[:, None] * tokens + best).flatten()
    y = inner(x.flatten(0, 1)[flat].view(rows, -1, x.shape[-1]), ids.flatten()[flat].view(rows, -1))
    return x.flatten(0, 1).index_copy(0, flat, y.flatten(0, 1)).view_as(x)
