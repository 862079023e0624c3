"""Recurrent layers and cells: by their definition, as linear maps and functions of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.interceptor import Interceptor

KINDS: dict[Any, str] = {
    torch.gru: "gru", torch.lstm: "lstm", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu",
    torch.gru_cell: "gru", torch.lstm_cell: "lstm", torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu",
}  # fmt: skip


def _next(kind: str, of_x: Tensor, of_h: Tensor, state: Sequence[Tensor], projection: Tensor | None) -> list[Tensor]:
    """The state after one time, from what the input and the hidden state are mapped to."""
    if kind == "gru":
        size = of_x.shape[-1] // 3
        gates = torch.sigmoid(of_x[..., : 2 * size] + of_h[..., : 2 * size])
        r, z = gates.chunk(2, -1)
        n = torch.tanh(of_x[..., 2 * size :] + r * of_h[..., 2 * size :])
        return [torch.lerp(n, state[0], z)]
    if kind == "lstm":
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return [h if projection is None else F.linear(h, projection), c]
    return [torch.relu(of_x + of_h) if kind == "relu" else torch.tanh(of_x + of_h)]


def _of_examples(it: Interceptor, state: Tensor, like: Tensor) -> Tensor:
    """A state of zeros for all examples is a state of each of them."""
    if not it.is_constant(state):
        return state
    row = like[..., :1]
    return torch.where(torch.ones_like(row, dtype=torch.bool), state, row)


def cell(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.gru_cell`` and its like."""
    x, state, w_x, w_h, *biases = args
    b_x, b_h = biases if biases else (None, None)
    kind = KINDS[func]
    with it:
        given = [_of_examples(it, s, x) for s in (state if kind == "lstm" else [state])]
        new = _next(kind, F.linear(x, w_x, b_x), F.linear(given[0], w_h, b_h), given, None)
    return tuple(new) if kind == "lstm" else new[0]


def recurrent(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.gru`` and its like: the inputs of all times at once, then time by time."""
    if len(args) != 9 or kwargs:
        return NotImplemented
    sources = [s for s in map(it.source, _flat(args)) if s is not None]
    if isinstance(args[3], list | tuple):
        raise it.unsupported(sources, func, "packed sequences; pass padded ones, and mask what lies behind their ends")
    x, state, weights, has_biases, layers, dropout, training, two_ways, batch_first = args
    if dropout and training:
        raise it.unsupported(sources, func, "dropout= between its layers in training mode; use a module for each layer")
    kind, ways = KINDS[func], 2 if two_ways else 1
    each = len(weights) // (layers * ways)
    with it:
        tokens = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
        states = [_of_examples(it, s, tokens[0]) for s in (state if kind == "lstm" else [state])]
        last: list[list[Tensor]] = []
        for layer in range(layers):
            outputs = []
            for k in range(layer * ways, (layer + 1) * ways):
                w_x, w_h, *others = weights[k * each : (k + 1) * each]
                b_x, b_h = others[:2] if has_biases else (None, None)
                projection = others[-1] if len(others) > (2 if has_biases else 0) else None
                inputs = F.linear(tokens, w_x, b_x).unbind(0)
                now, done = [s[k] for s in states], []
                backwards = k % ways == 1
                for of_x in reversed(inputs) if backwards else inputs:
                    now = _next(kind, of_x, F.linear(now[0], w_h, b_h), now, projection)
                    done.append(now[0])
                outputs.append(torch.stack(done[::-1] if backwards else done))
                last.append(now)
            tokens = outputs[0] if ways == 1 else torch.cat(outputs, -1)
        out = tokens.transpose(0, 1) if batch_first and x.dim() == 3 else tokens
        return out, *(torch.stack([now[j] for now in last]) for j in range(len(states)))


def _flat(values: Any) -> list[Any]:
    return [v for item in values for v in (item if isinstance(item, list | tuple) else [item])]
