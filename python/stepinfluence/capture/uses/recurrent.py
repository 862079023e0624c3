"""Recurrent layers and cells: by their definition, as linear maps and functions of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.owners import Owners, meet
from stepinfluence.capture.uses.interceptor import Interceptor

KINDS: dict[Any, str] = {
    torch.gru: "gru", torch.lstm: "lstm", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu",
    torch.gru_cell: "gru", torch.lstm_cell: "lstm", torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu",
}  # fmt: skip


def _next(kind: str, of_x: Tensor, of_h: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
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
        return [torch.sigmoid(o) * torch.tanh(c), c]
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
        new = _next(kind, F.linear(x, w_x, b_x), F.linear(given[0], w_h, b_h), given)
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
    single = x.dim() == 2  # one sequence, without a dimension of examples
    with it:
        tokens = x.transpose(0, 1) if batch_first and not single else x
        states = [_of_examples(it, s, tokens[0]) for s in (state if kind == "lstm" else [state])]
        if single:
            tokens, states = tokens.unsqueeze(1), [s.unsqueeze(1) for s in states]
    last: list[list[Tensor]] = []
    for layer in range(layers):
        outputs = []
        for k in range(layer * ways, (layer + 1) * ways):
            with it:
                begin = [s[k] for s in states]
            own = weights[k * each : (k + 1) * each]
            biases = own[2:4] if has_biases else (None, None)
            projection = own[-1] if each in (3, 5) else None
            found = _one_way(it, func, tokens, begin, (*own[:2], *biases, projection), backwards=k % ways == 1)
            outputs.append(found[0])
            last.append(found[1:])
        with it:
            tokens = outputs[0] if ways == 1 else torch.cat(outputs, -1)
    with it:
        ends = [torch.stack([now[j] for now in last]) for j in range(len(states))]
        if single:
            return tokens.squeeze(1), *(end.squeeze(1) for end in ends)
        return tokens.transpose(0, 1) if batch_first else tokens, *ends


def _one_way(
    it: Interceptor,
    func: Any,
    tokens: Tensor,
    state: list[Tensor],
    weights: Sequence[Tensor | None],
    *,
    backwards: bool,
) -> list[Tensor]:
    """One direction of one layer: its outputs ``(T, B, d)``, then its last state, ``(B, d)`` each.

    The same weights map the hidden state at every time. To the results of all times a tensor of zeros is added: the
    gradient there, of all times in one piece, is handed over together with the states.
    """
    w_x, w_h, b_x, b_h, projection = weights
    with it:
        inputs = F.linear(tokens, w_x, b_x)  # type: ignore[arg-type]
    shape = inputs.shape[:2]
    parts = [it.owners.lead(inputs, [1]), *(it.owners.lead(s, [0]) for s in state)]
    known = [p for p in parts if p is not None]
    owners = meet(known, shape[1:]) if len(known) == len(parts) else None
    mapped: list[Tensor] = []
    cells: list[Tensor] = []
    at_h = _shift(it, func, inputs.new_zeros(inputs.shape), _at_times(owners, shape), (w_h, b_h), mapped)
    at_p = None
    if projection is not None:
        zeros = inputs.new_zeros(*shape, len(projection))
        at_p = _shift(it, func, zeros, _at_times(owners, shape), (projection, None), cells)
    w, b, p = (it.detached(t) for t in (w_h, b_h, projection))
    now, before, raw, done = list(state), [], [], []
    # Taken apart at once: a gradient for each place would be one of the size of all.
    of_x, of_h, of_p = (None if t is None else t.unbind(0) for t in (inputs, at_h, at_p))
    assert of_x is not None
    assert of_h is not None
    order = range(len(inputs))
    for t in reversed(order) if backwards else order:
        before.append(now[0])
        now = _next(KINDS[func], of_x[t], F.linear(now[0], w, b) + of_h[t], now)
        if of_p is not None:
            raw.append(now[0])
            now[0] = F.linear(now[0], p) + of_p[t]
        done.append(now[0])
    for held, kept in ((mapped, before), (cells, raw)):  # copies: what the model may change in place is not these
        if kept:
            held.append(torch.stack(kept[::-1] if backwards else kept).detach())
    results = [torch.stack(done[::-1] if backwards else done), *now]
    if it.owners.following:
        for result in results:
            if owners is None:
                it.owners.follower.unknown(result)
            else:
                whole = owners if result.dim() == 2 else _at_times(owners, shape)
                assert whole is not None
                found = whole.map(result.shape, lambda ends, _: ends.unsqueeze(-1))
                found.along = whole.along
                it.owners.follower.note(result, found, tapped=True)
    return results


def _at_times(owners: Owners | None, shape: Sequence[int]) -> Owners | None:
    """Owners ``(B,)`` at every time, ``(T, B)``."""
    return None if owners is None else owners.broadcast(shape)


def _shift(
    it: Interceptor,
    func: Any,
    zeros: Tensor,
    owners: Owners | None,
    weights: tuple[Tensor | None, Tensor | None],
    given: list[Tensor],
) -> Tensor:
    """Zeros ``(T, B, d)`` to be added to what a linear map by these weights gives; by the time their gradient is
    there, ``given`` holds what was mapped, ``(T, B, e)``."""
    on_weight, on_bias = it.source(weights[0]), it.source(weights[1])
    if on_weight is None and on_bias is None:
        return zeros
    use = it.use(func, owners, on_weight, on_bias)

    def receive(grad: Tensor, _: tuple[Tensor, ...]) -> None:
        if on_weight is not None:
            it.sink.linear(on_weight, use, given[0], grad)
        if on_bias is not None:
            it.sink.vector(on_bias, use, grad)

    return it.tap(zeros, use, receive)


def _flat(values: Any) -> list[Any]:
    return [v for item in values for v in (item if isinstance(item, list | tuple) else [item])]
