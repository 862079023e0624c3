"""Operations around others: they bring the tokens into another layout and take them back.

Each is called with ``(x, ids, inner)``: ``x (rows, tokens, d)``, ``ids (rows, tokens)`` with 0 for padding, and
``inner(x, ids)``, which is given both in the new layout. What decides (order, lengths, experts) is computed from
``ids`` or ``x``, so that every example is treated as it would be on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils import rnn

Inner: TypeAlias = Callable[[Tensor, Tensor], Tensor]


# Folding: windows or tokens go into the dimension of the examples ------------------------------------------------


def fold(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    how = node["how"]
    rows, tokens, _ = x.shape
    n = math.gcd(tokens, node.get("n", 1)) if how in SEQUENTIAL_FOLDS else 1
    there, back = FOLDS[how]
    count = tokens // n
    return back(inner(there(x, count, n), there(ids[..., None], count, n)[..., 0]), rows, count, n)


def _bw(x: Tensor, w: int, n: int) -> Tensor:
    return x.reshape(len(x) * w, n, x.shape[-1])


def _wb(x: Tensor, w: int, n: int) -> Tensor:
    return x.view(len(x), w, n, -1).permute(1, 0, 2, 3).flatten(0, 1)


FOLDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "(b w) n d": (_bw, lambda y, b, w, n: y.reshape(b, w * n, -1)),
    "(w b) n d": (_wb, lambda y, b, w, n: y.view(w, b, n, -1).permute(1, 0, 2, 3).flatten(1, 2)),
    "(w b) n d, cat": (
        lambda x, w, n: torch.cat(x.chunk(w, 1), 0),
        lambda y, b, w, n: torch.cat(y.chunk(w, 0), 1),
    ),
    "(b w) n d, stack": (
        lambda x, w, n: torch.stack(x.split(n, 1), 1).flatten(0, 1),
        lambda y, b, w, n: torch.cat(y.unflatten(0, (b, w)).unbind(1), 1),
    ),
    "(b n) w d": (  # windows with gaps: every n-th token
        lambda x, w, n: x.unflatten(1, (w, n)).transpose(1, 2).flatten(0, 1),
        lambda y, b, w, n: y.unflatten(0, (b, n)).transpose(1, 2).flatten(1, 2),
    ),
    "(n b) w d": (
        lambda x, w, n: x.unflatten(1, (w, n)).permute(2, 0, 1, 3).flatten(0, 1),
        lambda y, b, w, n: y.unflatten(0, (n, b)).permute(1, 2, 0, 3).flatten(1, 2),
    ),
    "(b t) d": (lambda x, w, n: x.flatten(0, 1), lambda y, b, w, n: y.view(b, w * n, -1)),
    "(t b) d": (
        lambda x, w, n: x.transpose(0, 1).flatten(0, 1),
        lambda y, b, w, n: y.view(w * n, b, -1).transpose(0, 1),
    ),
    "1 (b t) d": (lambda x, w, n: x.reshape(1, -1, x.shape[-1]), lambda y, b, w, n: y.reshape(b, w * n, -1)),
    "1 (t b) d": (
        lambda x, w, n: x.transpose(0, 1).reshape(1, -1, x.shape[-1]),
        lambda y, b, w, n: y.view(w * n, b, -1).transpose(0, 1),
    ),
    "t b d": (lambda x, w, n: x.transpose(0, 1), lambda y, b, w, n: y.transpose(0, 1)),
    "n w b d": (
        lambda x, w, n: x.view(len(x), w, n, -1).permute(2, 1, 0, 3),
        lambda y, b, w, n: y.permute(2, 1, 0, 3).reshape(b, w * n, -1),
    ),
}
SEQUENTIAL_FOLDS = ("(b w) n d", "(w b) n d", "(w b) n d, cat", "(b w) n d, stack", "(b n) w d", "(n b) w d")
"""Those in which dimension 1 of what is inside holds tokens of one example."""


# Padding removed -------------------------------------------------------------------------------------------------


def unpad(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    how, put = node["how"], node["back"]
    lengths = (ids > 0).sum(1).tolist()
    mask = ids > 0
    index = mask.flatten().nonzero()[:, 0]
    if how == "packed" and all(lengths):
        kept = torch.tensor(lengths)
        packed = rnn.pack_padded_sequence(x, kept, batch_first=True, enforce_sorted=False)
        marks = rnn.pack_padded_sequence(ids, kept, batch_first=True, enforce_sorted=False)
        y = inner(packed.data, marks.data)
        again = rnn.PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return rnn.pad_packed_sequence(again, batch_first=True, total_length=x.shape[1])[0]
    if how == "slices":
        z, tokens = (torch.cat([t[i, :n] for i, n in enumerate(lengths)]) for t in (x, ids))
    elif how == "backwards":  # the last example's tokens first
        z, tokens = (torch.cat([t[i, : lengths[i]] for i in reversed(range(len(t)))]) for t in (x, ids))
        n = list(reversed(lengths))
        pieces = list(reversed(inner(z, tokens).split(n)))
        return rnn.pad_sequence([*pieces, x.new_zeros(x.shape[1], x.shape[2])], batch_first=True)[:-1]
    elif how == "one row":  # all examples' tokens in one sequence
        z, tokens = (torch.cat([t[i, :n] for i, n in enumerate(lengths)])[None] for t in (x, ids))
    elif how == "sorted tokens":  # from all examples, in the order of their numbers
        z, tokens = x.flatten(0, 1)[index], ids.flatten()[index]
        order = torch.argsort(tokens, stable=True)
        z, tokens = z[order], tokens[order]
    elif how == "narrow":
        z, tokens = (torch.cat([t.select(0, i).narrow(0, 0, n) for i, n in enumerate(lengths)]) for t in (x, ids))
    elif how == "unbind":
        z, tokens = (torch.cat([r[:n] for r, n in zip(t.unbind(0), lengths, strict=True)]) for t in (x, ids))
    elif how == "index":
        z, tokens = x.flatten(0, 1)[index], ids.flatten()[index]
    elif how == "index_select":
        z, tokens = x.flatten(0, 1).index_select(0, index), ids.flatten().index_select(0, index)
    else:
        z, tokens = x[mask], ids[mask]
    y = inner(z, tokens).reshape(-1, x.shape[-1])
    if how == "sorted tokens":
        y = y[torch.argsort(order)]
    if put == "pad_sequence":
        return rnn.pad_sequence([*y.split(lengths), x.new_zeros(x.shape[1], x.shape[2])], batch_first=True)[:-1]
    if put == "stack":
        return torch.stack([torch.cat([r, x.new_zeros(x.shape[1] - len(r), x.shape[2])]) for r in y.split(lengths)])
    out = torch.zeros_like(x)
    if put == "mask":
        out[mask] = y
        return out
    if put == "masked_scatter":
        return out.masked_scatter(mask[..., None], y)
    if put == "rows":
        start = 0
        for i, n in enumerate(lengths):
            out[i, :n] = y[start : start + n]
            start += n
        return out
    return out.flatten(0, 1).index_copy(0, index, y).view_as(x)


# Examples in another order ---------------------------------------------------------------------------------------


def reorder(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    rows = len(x)
    keys = {"length": (ids > 0).sum(1), "first token": ids[:, 0], "sum": ids.sum(1)}
    if node["order"] in keys:
        order = torch.argsort(keys[node["order"]], stable=True)
    else:
        order = torch.arange(rows).flip(0) if node["order"] == "flip" else torch.arange(rows).roll(1)
    inverse = torch.argsort(order)
    y = inner(MOVES[node["how"]](x, order), MOVES[node["how"]](ids, order))
    return MOVES[node["back"]](y, inverse)


MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stack": lambda x, order: torch.stack([x[i] for i in order.tolist()]),
    "cat": lambda x, order: torch.cat([x[i : i + 1] for i in order.tolist()]),
    "unbind": lambda x, order: torch.stack([x.unbind(0)[i] for i in order.tolist()]),
    "narrow": lambda x, order: torch.cat([x.narrow(0, i, 1) for i in order.tolist()]),
    "split": lambda x, order: torch.cat([x.split(1)[i] for i in order.tolist()]),
    "index": lambda x, order: x[order],
    "list": lambda x, order: x[order.tolist()],
    "index_select": lambda x, order: x.index_select(0, order),
    "gather": lambda x, order: x.gather(0, order.view(-1, *(1,) * (x.dim() - 1)).expand_as(x)),
    "index_copy": lambda x, order: torch.zeros_like(x).index_copy(0, torch.argsort(order), x),
    "set": lambda x, order: _set(x, order),
    "permutation matrix": lambda x, order: (
        torch.tensordot(torch.eye(len(x), dtype=x.dtype)[order], x, 1) if x.is_floating_point() else x[order]
    ),
}


def _set(x: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for k, i in enumerate(order.tolist()):
        out[k] = x[i]
    return out


# Examples in parts -----------------------------------------------------------------------------------------------


def parts(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    how = node["how"]
    if how == "ragged":
        lengths = (ids > 0).sum(1).clamp(min=1).tolist()
        done = [inner(x[i : i + 1, :n], ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
        return torch.cat([torch.cat([y, x[i : i + 1, y.shape[1] :]], 1) for i, y in enumerate(done)])
    if how == "one by one":
        return torch.cat([inner(x[i : i + 1], ids[i : i + 1]) for i in range(len(x))])
    if how == "integers":
        return torch.stack([inner(x[i][None], ids[i][None])[0] for i in range(len(x))])
    if how == "every other":
        out = torch.zeros_like(x)
        for k in range(min(2, len(x))):
            out[k::2] = inner(x[k::2], ids[k::2])
        return out
    if how in ("buckets", "buckets, stack"):  # examples of one length together
        lengths = (ids > 0).sum(1).tolist()
        out = torch.zeros_like(x)
        for n in sorted(set(lengths)):
            which = [i for i, length in enumerate(lengths) if length == n]
            if how == "buckets":
                out[which, : max(n, 1)] = inner(x[which, : max(n, 1)], ids[which, : max(n, 1)])
            else:
                part = inner(torch.stack([x[i] for i in which]), torch.stack([ids[i] for i in which]))
                out = out.index_copy(0, torch.tensor(which), part)
        return out
    if how == "chunk":
        return torch.cat([inner(a, b) for a, b in zip(x.chunk(2), ids.chunk(2), strict=True)])
    if how == "split":
        return torch.cat([inner(a, b) for a, b in zip(x.split(2), ids.split(2), strict=True)])
    if how == "tokens one by one":
        return torch.stack([inner(x[:, t : t + 1], ids[:, t : t + 1])[:, 0] for t in range(x.shape[1])], 1)
    raise AssertionError(how)


def streams(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    """Two versions of every example in one batch: twice as many rows."""
    other = x.flip(1).sin()
    if node["how"] == "interleaved":
        y = inner(torch.stack([x, other], 1).flatten(0, 1), ids.repeat_interleave(2, 0)).unflatten(0, (-1, 2))
        return (y[:, 0] + y[:, 1]) / 2  # type: ignore[no-any-return]
    if node["how"] in COPIES:  # every example twice: (2 b) or (b 2)
        copy, back = COPIES[node["how"]]
        y = back(inner(copy(x), copy(ids)), len(x))
        return (y[:, 0] + y[:, 1]) / 2
    if node["how"] == "stacked":  # (2, rows, tokens, d): each token on its own
        y = inner(torch.stack([x, other]), torch.stack([ids, ids]))
        return (y[0] + y[1]) / 2
    a, b = inner(torch.cat([x, other], 0), torch.cat([ids, ids], 0)).chunk(2)
    return (a + b.flip(1)) / 2


COPIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "repeated": (
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda y, rows: y.unflatten(0, (2, rows)).transpose(0, 1),
    ),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), lambda y, rows: y.unflatten(0, (rows, 2))),
    "expanded": (
        lambda x: x[:, None].expand(-1, 2, *x.shape[1:]).flatten(0, 1),
        lambda y, rows: y.view(rows, 2, *y.shape[1:]),
    ),
    "expanded first": (lambda x: x.expand(2, *x.shape).flatten(0, 1), lambda y, rows: torch.stack(y.split(rows), 1)),
}


def subset(x: Tensor, ids: Tensor, inner: Inner, node: dict[str, Any]) -> Tensor:
    """Only some examples go through what is inside, as in early exits; the others stay as they are."""
    how = node["how"]
    active = ids[:, 0] % 3 > 0
    which = active.nonzero()[:, 0]
    chosen = which.tolist()
    if not chosen:
        return x
    if how == "mask":
        out = x.clone()
        out[active] = inner(x[active], ids[active])
        return out
    if how == "index":
        return x.index_copy(0, which, inner(x[which], ids[which]))
    if how == "add":
        return x.index_add(0, which, inner(x.index_select(0, which), ids.index_select(0, which)), alpha=0.5)
    done = inner(torch.stack([x[i] for i in chosen]), torch.stack([ids[i] for i in chosen]))
    rows = list(x.unbind(0))
    for i, row in zip(chosen, done, strict=True):
        rows[i] = row
    return torch.stack(rows)
