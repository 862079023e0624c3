"""How each operation hands its parameters' gradients over: one rule per kind of use.

A rule takes ``(interceptor, func, args, kwargs)`` of a call in which a source meets data. It computes the operation
with the parameters detached, taps the result, and returns it; or it returns ``NotImplemented`` if the call is not of
the form it knows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stepinfluence.capture.bags import embedding_bag
from stepinfluence.capture.interceptor import EXPANSIONS, OUTSIDE, Interceptor, changes_in_place
from stepinfluence.capture.owners import Owners
from stepinfluence.capture.rows import gains_examples
from stepinfluence.capture.sources import Source
from stepinfluence.capture.steps import in_backward

Rule: TypeAlias = Callable[[Interceptor, Any, tuple[Any, ...], dict[str, Any]], Any]


def _detached(it: Interceptor, value: Any) -> Any:
    return value.detach() if it.source(value) is not None else value


def _without_capture(it: Interceptor, func: Any, args: Any, kwargs: Any) -> Any:
    """The call with its sources detached: for uses outside the loop that are to be left out."""
    args, kwargs = pytree.tree_map(lambda v: _detached(it, v), (args, kwargs))
    return func(*args, **kwargs)


def _linear_tap(
    it: Interceptor, func: Any, output: Tensor, x: Tensor, weight: Source | None, bias: Source | None
) -> Tensor:
    """Tap ``output = x W^T + b``."""
    use = it.use(func, it.owners(x, 1), weight, bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        if weight is not None:
            it.sink.linear(weight, use, saved[0].conj(), grad)  # of complex maps; a real tensor is its own
        if bias is not None:
            it.sink.vector(bias, use, grad)

    return it.tap(output, use, receive, *(() if weight is None else (x,)))


def linear(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.linear(x, W, b)``."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if it.source(x) is not None:
        return NotImplemented
    output = F.linear(x, _detached(it, weight), _detached(it, bias))
    return _linear_tap(it, func, output, x, it.source(weight), it.source(bias))


def matmul(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x @ P`` and ``P @ x``."""
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = (args[1], args[0]) if func.__name__ == "__rmatmul__" else args
    on_left, on_right = it.source(left), it.source(right)
    if on_left is not None and on_right is not None:
        return NotImplemented
    source = on_left or on_right
    if source is None or source.tensor.dim() > 2 or (on_left is not None and source.tensor.dim() != 2):
        return batched_product(it, func, args, kwargs)
    if right.dim() == 1 and on_left is not None:
        return NotImplemented
    output = torch.matmul(_detached(it, left), _detached(it, right))
    if on_left is not None:
        use = it.use(func, it.owners_of_columns(right), source)
    else:
        use = it.use(func, it.owners(left, 1), source)
    used = source

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        data = saved[0].conj()
        if on_left is not None:
            it.sink.linear(used, use, data.transpose(-1, -2), grad.transpose(-1, -2))
        elif used.tensor.dim() == 2:  # the parameter's first index runs over the input: roles are swapped
            it.sink.linear(used, use, grad, data.to(grad.dtype))
        else:
            it.sink.vector(used, use, data.to(grad.dtype) * grad.unsqueeze(-1))

    return it.tap(output, use, receive, right if on_left is not None else left)


def batched_product(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products with a stack of matrices ``(E, k, n)``, as of experts or heads: one product for each matrix."""
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = (args[1], args[0]) if func.__name__ == "__rmatmul__" else args
    on_left, on_right = it.source(left), it.source(right)
    stack, data = (left, right) if on_left is not None else (right, left)
    if (on_left is None) == (on_right is None) or stack.dim() != 3 or data.dim() < 3 or data.shape[-3] != len(stack):
        return NotImplemented
    with it:
        parts = [
            torch.matmul(m, d) if on_left is not None else torch.matmul(d, m)
            for m, d in zip(stack.unbind(0), data.unbind(-3), strict=True)
        ]
        return torch.stack(parts, -3)


def einsum(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``einsum`` of data and one parameter: a linear map, repeated over the letters that both sides keep."""
    equation, *operands = args
    if not isinstance(equation, str) or kwargs:
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    which = [k for k, t in enumerate(operands) if it.source(t) is not None]
    if len(operands) != 2 or len(which) != 1:
        return NotImplemented
    parameter, data = operands[which[0]], operands[1 - which[0]]
    names = letters_of(equation, [t.dim() for t in operands])
    if names is None:
        return NotImplemented
    of_parameter, of_data, of_result = names[which[0]], names[1 - which[0]], names[2]
    inner = [c for c in of_parameter if c in of_data and c not in of_result]
    both = [c for c in of_parameter if c in of_data and c in of_result]
    outer = [c for c in of_parameter if c not in of_data]
    lead = [c for c in of_data if c not in of_parameter]
    plain = set(outer) <= set(of_result) and set(lead) <= set(of_result)
    if not plain or any(len(set(n)) < len(n) for n in names) or any(parameter.shape[of_parameter.index(c)] == 1 for c in both):
        return NotImplemented
    source = it.source(parameter)
    assert source is not None
    apart = next((c for c in both if not it.alike_along(data, of_data.index(c))), None)
    if apart is not None:  # as of experts with rows of their own: one product for each
        with it:
            rest = [[n for n in part if n != apart] for part in (of_parameter, of_data, of_result)]
            pairs = zip(parameter.unbind(of_parameter.index(apart)), data.unbind(of_data.index(apart)), strict=True)
            return torch.stack([_einsum(rest, *pair) for pair in pairs], of_result.index(apart))
    output = torch.einsum(equation, *(_detached(it, t) for t in operands))
    use = it.use(func, it.lead_owners(data, [of_data.index(c) for c in lead]), source)
    order = [of_data.index(c) for c in (*lead, *both, *inner)]
    shown = [of_result.index(c) for c in (*lead, *both, *outer)]
    back = [(*both, *outer, *inner).index(c) for c in of_parameter]

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        x, g = saved[0].conj().permute(order), grad.permute(shown)
        it.sink.products(source, use, x, g, (len(both), len(outer), len(inner)), back)

    return it.tap(output, use, receive, data)


def _einsum(names: Sequence[Sequence[str]], *operands: Tensor) -> Tensor:
    """``einsum`` of operands whose dimensions, and then the result's, have names of any length."""
    letter = {name: chr(ord("a") + k) for k, name in enumerate(dict.fromkeys(n for part in names for n in part))}
    *given, out = ("".join(letter[n] for n in part) for part in names)
    return torch.einsum(f"{','.join(given)}->{out}", *operands)


def letters_of(equation: str, dims: Sequence[int]) -> tuple[list[str], list[str], list[str]] | None:
    """Names of the dimensions of an einsum's operands and of its result; None where it has more than two operands."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    given = left.split(",")
    if len(given) != 2 or len(dims) != 2:
        return None
    names = [dimension_names(letters, dim) for letters, dim in zip(given, dims, strict=True)]
    if not arrow:
        single = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(single)
    dotted = max((sum(n.startswith(".") for n in part) for part in names), default=0)
    head, dots, tail = out.partition("...")
    result = [*head, *(f".{k}" for k in range(dotted, 0, -1)), *tail] if dots else list(head)
    return names[0], names[1], result


def dimension_names(letters: str, dim: int) -> list[str]:
    """One name for each dimension; those of an ellipsis are counted from its right end."""
    head, dots, tail = letters.partition("...")
    return [*head, *(f".{k}" for k in range(dim - len(head) - len(tail), 0, -1)), *tail] if dots else list(head)


def addmm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``addmm(b, x, P)``, as Hugging Face's Conv1D calls it."""
    if len(args) != 3 or kwargs or changes_in_place(func, kwargs):
        return NotImplemented
    bias, x, weight = args
    on_weight, on_bias = it.source(weight), it.source(bias)
    if it.source(x) is not None or (on_bias is None and it.source(bias) is not None) or bias.dim() != 1:
        return NotImplemented
    output = torch.addmm(_detached(it, bias), x, _detached(it, weight))
    use = it.use(func, it.owners(x, 1), on_weight, on_bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        if on_weight is not None:
            it.sink.linear(on_weight, use, grad, saved[0].conj().to(grad.dtype))
        if on_bias is not None:
            it.sink.vector(on_bias, use, grad)

    return it.tap(output, use, receive, *(() if on_weight is None else (x,)))


def embedding(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.embedding(W, ids, padding_idx, scale_grad_by_freq, sparse)``, to which ``F.embedding`` comes down."""
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    padding = given.get("padding_idx", -1)
    return _lookup(it, func, given["weight"], given["indices"], padding, given.get("scale_grad_by_freq", False))


def getitem(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P[ids]`` with an integer tensor: a lookup."""
    table, index = args
    if it.source(table) is not None and _picks_one(index):
        # Which part of the parameter it is does not depend on anything that gradients flow through.
        items = tuple(int(i) if isinstance(i, Tensor) else i for i in (index if isinstance(index, tuple) else (index,)))
        return it.batch_free(func, (table, items), {}, [it.source(table)])
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if it.source(table) is None or not isinstance(index, Tensor) or index.dtype == torch.bool:
        return NotImplemented
    return _lookup(it, func, table, index, -1, False)


def _picks_one(index: Any) -> bool:
    """Whether an index is made of whole numbers, slices and 0-d tensors: one expert of many, say."""
    items = index if isinstance(index, tuple) else (index,)
    single = [i for i in items if isinstance(i, Tensor)]
    if not single or any(i.dim() or i.dtype in (torch.bool, torch.uint8) for i in single):
        return False
    return all(isinstance(i, Tensor | int | slice | type(None) | type(Ellipsis)) for i in items)


def index_select(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P.index_select(0, ids)``: a lookup."""
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    if it.source(given["input"]) is None or given["dim"] != 0:
        return NotImplemented
    return _lookup(it, func, given["input"], given["index"], -1, False)


def _lookup(it: Interceptor, func: Any, table: Any, ids: Tensor, padding: int, by_frequency: bool) -> Any:
    source = it.source(table)
    if source is None or source.tensor.dim() < 2 or it.source(ids) is not None:
        return NotImplemented
    if by_frequency:
        raise it.unsupported([source], func, "scale_grad_by_freq mixes the examples of a batch")
    owners = it.owners(ids)
    # Negative indices of plain indexing count from the end; as a lookup they are wrapped.
    ids = torch.where(ids < 0, ids + len(table), ids) if func is not torch.embedding else ids
    row = tuple(table.shape[1:])
    output = torch.embedding(table.detach().flatten(1), ids)
    output = output.unflatten(-1, row) if len(row) > 1 else output
    use = it.use(func, owners, source)
    used = source

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        it.sink.embedding(used, use, saved[0], grad.flatten(-len(row)), padding if padding >= 0 else None)

    return it.tap(output, use, receive, ids)


def layer_norm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.layer_norm(x, shape, W, b, eps)``, to which ``F.layer_norm`` comes down."""
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, shape, eps = given["input"], tuple(given["normalized_shape"]), given.get("eps", 1e-5)
    weight, bias = given.get("weight"), given.get("bias")
    if it.source(x) is not None:
        return NotImplemented
    output = torch.layer_norm(x, shape, _detached(it, weight), _detached(it, bias), eps)

    def statistics(flat: Tensor) -> tuple[Tensor, Tensor]:
        # By the fused normalisation, whose result is dropped: several times faster on CPUs than var_mean.
        _, mean, rstd = torch.native_layer_norm(flat, flat.shape[-1:], None, None, eps)
        return mean.squeeze(-1), rstd.squeeze(-1)

    return _norm_tap(it, func, output, x, len(shape), it.source(weight), it.source(bias), statistics)


def rms_norm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.rms_norm(x, shape, W, eps)``, to which ``F.rms_norm`` comes down."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    x, shape, eps, weight = given["input"], tuple(given["normalized_shape"]), given.get("eps"), given.get("weight")
    if it.source(x) is not None:
        return NotImplemented
    output = torch.rms_norm(x, shape, _detached(it, weight), eps)
    # The default depends on the dtype, which is another one where the statistics are taken again.
    same_eps = torch.finfo(output.dtype).eps if eps is None else eps

    def statistics(flat: Tensor) -> tuple[None, Tensor]:
        return None, (flat.square().mean(-1) + same_eps).rsqrt()

    return _norm_tap(it, func, output, x, len(shape), it.source(weight), None, statistics)


def _norm_tap(
    it: Interceptor,
    func: Any,
    output: Tensor,
    x: Tensor,
    feature_dims: int,
    weight: Source | None,
    bias: Source | None,
    statistics: Callable[[Tensor], tuple[Tensor | None, Tensor]],
) -> Any:
    use = it.use(func, it.owners(x, feature_dims), weight, bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        # In single precision at least, as the normalisation itself does whatever the dtype of its input.
        precise = torch.promote_types(grad.dtype, torch.float32)
        data, g = (t.to(precise).flatten(t.dim() - feature_dims) for t in (saved[0], grad))
        if weight is not None:
            # Mean and deviation again, which costs less than keeping normalised activations of every step.
            it.sink.scaled(weight, use, g, data, *statistics(data))
        if bias is not None:
            it.sink.vector_or_dense(bias, use, g)

    return it.tap(output, use, receive, x)


def elementwise(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcast arithmetic: sources are expanded to the full shape, so that autograd does not sum over examples."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if kwargs.get("out") is not None or (it.source(args[0]) is not None and changes_in_place(func, kwargs)):
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    others = [t for t in tensors if it.source(t) is None and (t.is_floating_point() or t.is_complex())]
    owners = it.joint_owners([t for t in tensors if it.source(t) is None], shape)

    def expand(value: Any) -> Any:
        source = it.source(value)
        if source is None:
            return value
        result = expanded(it, func, source, shape, owners)
        if value.dim() == 0 and others:
            # A 0-d operand does not take part in type promotion; expanded, it would.
            result = result.to(torch.result_type(others[0], value))
        return result

    return func(*(expand(v) for v in args), **{k: expand(v) for k, v in kwargs.items()})


def expanded(it: Interceptor, func: Any, source: Source, shape: tuple[int, ...], owners: Owners | None) -> Tensor:
    """A source broadcast to ``shape``, whose elements' gradients belong to ``owners``."""
    use = it.use(func, owners, source)
    return it.tap_expanded(source, use, lambda grad, _: it.sink.expanded(source, use, grad), tuple(shape))


def setitem(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[index] = P``: the parameter is broadcast to the places it is written to."""
    x, index, value = args
    source = it.source(value)
    if source is None or it.source(x) is not None:
        return NotImplemented
    places = x.detach()[index]
    part = it.owners_after(Tensor.__getitem__, (x, index), places)
    func(x, index, expanded(it, func, source, tuple(places.shape), part))
    return x


def expand_to_batch(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P.expand(B, ...)``, ``P.repeat(B, 1, ...)``: the result has a row per example and counts as data."""
    if func not in EXPANSIONS:
        return NotImplemented
    value = args[0]
    source = it.source(value)
    if source is None:
        return NotImplemented
    shape = tuple(func(value.detach(), *args[1:], **kwargs).shape)
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    dim = gains_examples(value.shape, shape, it.batch_size, it.example_dims)
    if dim is None:
        return NotImplemented
    if any(a not in (1, s) for a, s in zip(aligned, shape, strict=True)):  # tiled along other dimensions
        return NotImplemented
    owners = Owners.along_dim(shape, dim, value.device)
    result = expanded(it, func, source, shape, owners)
    # A repeated tensor has memory of its own: the model may change it in place.
    result = result.clone(memory_format=torch.contiguous_format) if func is Tensor.repeat else result
    it.follower.note(result, owners, tapped=True)
    it.doubted = True
    return result


def attention(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.multi_head_attention_forward``: looked inside."""
    return it.look_inside(func, args, kwargs)


def convolution(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``conv1d`` and its like: a linear map of the patches, so that one product serves all examples."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    dims = weight.dim() - 2
    if it.source(weight) is None or it.source(x) is not None or x.dim() != dims + 2:
        return NotImplemented
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        spans = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        sides = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
    else:
        sides = [(p, p) for p in _each(padding, dims)]
    with it:
        x = F.pad(x, [n for side in reversed(sides) for n in side]) if any(map(any, sides)) else x
        for k in range(dims):
            span = dilation[k] * (weight.shape[2 + k] - 1) + 1
            x = x.unfold(2 + k, span, stride[k])[..., :: dilation[k]]
        # (N, C, *places, *kernel) and (O, C / groups, *kernel) -> (N, *places, O)
        x = x.movedim(1, 1 + dims)
        if groups == 1:
            out = F.linear(x.flatten(1 + dims), weight.flatten(1))
        else:
            x = x.unflatten(1 + dims, (groups, -1)).flatten(2 + dims)
            out = torch.einsum("...gk,gok->...go", x, weight.flatten(1).unflatten(0, (groups, -1))).flatten(-2)
        return (out if bias is None else out + bias).movedim(-1, 1)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def cell(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.gru_cell`` and its like, by their definition."""
    x, state, w_x, w_h, *biases = args
    b_x, b_h = biases if biases else (None, None)
    kind = func.__name__.removesuffix("_cell")
    with it:
        given = list(state) if kind == "lstm" else [state]
        # A state of zeros for all examples is a state of each of them.
        row = x[..., :1]
        state = [torch.where(torch.ones_like(row, dtype=torch.bool), s, row) if it.is_constant(s) else s for s in given]
        hidden = state[0]
        of_x, of_h = F.linear(x, w_x, b_x), F.linear(hidden, w_h, b_h)
        if kind == "gru":
            (r, z, n), (hr, hz, hn) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            n = torch.tanh(n + r * hn)
            return n + z * (hidden - n)
        if kind == "lstm":
            i, f, g, o = (of_x + of_h).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        return torch.relu(of_x + of_h) if kind == "rnn_relu" else torch.tanh(of_x + of_h)


def recurrent(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.gru`` and its like: cell by cell, in each direction of each layer."""
    if len(args) != 9 or kwargs or isinstance(args[3], list | tuple):  # packed sequences have another form
        return NotImplemented
    x, state, weights, has_biases, layers, dropout, training, two_ways, batch_first = args
    if not has_biases or (dropout and training) or any(w.shape[0] != weights[0].shape[0] for w in weights):
        return NotImplemented  # no biases, or projections
    one = {torch.gru: torch.gru_cell, torch.lstm: torch.lstm_cell, torch.rnn_tanh: torch.rnn_tanh_cell,
           torch.rnn_relu: torch.rnn_relu_cell}[func]  # fmt: skip
    states = list(state) if func is torch.lstm else [state]
    with it:
        tokens = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
        last: list[Any] = []
        for layer in range(layers):
            outputs = []
            for way in range(2 if two_ways else 1):
                k = 2 * layer + way if two_ways else layer
                now = [s[k] for s in states]
                rows = list(tokens.unbind(0))
                done = []
                for row in reversed(rows) if way else rows:
                    new = one(row, tuple(now) if func is torch.lstm else now[0], *weights[4 * k : 4 * k + 4])
                    now = list(new) if func is torch.lstm else [new]
                    done.append(now[0])
                outputs.append(torch.stack(done[::-1] if way else done))
                last.append(now)
            tokens = torch.cat(outputs, -1)
        out = tokens.transpose(0, 1) if batch_first and x.dim() == 3 else tokens
        return out, *(torch.stack([now[j] for now in last]) for j in range(len(states)))


def shape_or_type_only(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.to(P)``, ``x.type_as(P)``, ``x.expand_as(P)``: of the parameter only its shape or dtype counts."""
    if it.source(args[0]) is not None:
        return NotImplemented
    return _without_capture(it, func, args, kwargs)


def per_row(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operation: mapped over micro-batches of one row, with the parameter expanded for each.

    The gradient of the parameter is materialised by row for this one use. The result is compared with the plain
    operation's, so that an operation which mixes rows is refused.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sources = [s for s in map(it.source, leaves) if s is not None]
    if changes_in_place(func, kwargs):
        raise it.unsupported(sources, func, "it writes to a tensor in place")
    plain = _without_capture(it, func, args, kwargs)
    if not isinstance(plain, Tensor):
        raise it.unsupported(sources, func, "it gives several results, and its rule is not known")
    dims, owners = it.row_dims(func, leaves)
    count = next((leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True) if d is not None), None)
    if count is None:
        raise it.unsupported(sources, func, "its data has no dimension for the examples")
    use = it.use(func, owners, *sources)
    mapped: list[Any] = []
    where: list[int] = []
    for k, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        source = it.source(leaf)
        if source is not None:

            def receive(grad: Tensor, _: tuple[Tensor, ...], source: Source = source) -> None:
                it.sink.dense_rows(source, use, grad)

            mapped.append(it.tap_expanded(source, use, receive, (count, *leaf.shape)))
            where.append(k)
        elif dim is not None:
            mapped.append(leaf.movedim(dim, 0).unsqueeze(dim + 1))
            where.append(k)

    def one(*values: Tensor) -> Any:
        filled = list(leaves)
        for k, value in zip(where, values, strict=True):
            filled[k] = value
        inner_args, inner_kwargs = pytree.tree_unflatten(filled, spec)
        return func(*inner_args, **inner_kwargs)

    try:
        with warnings.catch_warnings():
            # Where torch maps an operation by a loop, it says so as a warning; the result is the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            result = torch.func.vmap(one, randomness="error")(*mapped)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if use.step == OUTSIDE or in_backward():  # left out; a recomputation comes here for those only
            return plain
        raise it.unsupported(sources, func, f"it does not map over examples: {str(error).splitlines()[0]}") from error
    dim = _row_dim(result, plain, next(d for d in dims if d is not None))
    if dim is None:
        raise it.unsupported(sources, func, "its result has no dimension for the examples")
    result = result.movedim(0, dim).squeeze(dim + 1)
    if not torch.allclose(result.detach(), plain.detach(), rtol=1e-3, atol=1e-5):
        raise it.unsupported(sources, func, "it mixes the examples of a batch")
    if owners is not None:
        it.follower.note(result, owners.at(dim, result.shape), tapped=True)
    return result


def _row_dim(mapped: Any, plain: Any, likely: int) -> int | None:
    """The dimension of an operation's result in which its rows lie that were computed one by one: ``mapped``
    ``(n, *shape with 1 there)``; None if there is none."""
    if not isinstance(plain, Tensor) or not isinstance(mapped, Tensor):
        return None
    one = mapped.shape[1:]
    for dim in (likely, *range(len(one))):
        if dim < len(one) and one[dim] == 1 and (*one[:dim], len(mapped), *one[dim + 1 :]) == tuple(plain.shape):
            return dim
    return None


def _named(*names: str) -> list[Any]:
    """The functions of these names in ``torch`` and ``torch.Tensor``, with their in-place and operator forms."""
    found = []
    for name in names:
        for owner, attribute in (
            (torch, name),
            (Tensor, name),
            (Tensor, f"{name}_"),
            (Tensor, f"__{name}__"),
            (Tensor, f"__r{name}__"),
            (Tensor, f"__i{name}__"),
        ):
            function = inspect.getattr_static(owner, attribute, None)
            if function is not None:
                found.append(getattr(owner, attribute))
    return found


ELEMENTWISE = _named(
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "truediv", "pow", "maximum",
    "minimum", "lerp", "addcmul", "addcdiv", "where", "atan2", "hypot", "fmod", "remainder", "xlogy", "float_power",
    "logaddexp", "rsub",
)  # fmt: skip

RULES: dict[Any, Rule] = {
    F.linear: linear,
    F.multi_head_attention_forward: attention,
    **dict.fromkeys(_named("matmul", "mm", "bmm"), matmul),
    **dict.fromkeys(_named("addmm"), addmm),
    torch.einsum: einsum,
    torch.embedding: embedding,
    Tensor.__getitem__: getitem,
    Tensor.__setitem__: setitem,
    **dict.fromkeys(_named("index_select"), index_select),
    torch.embedding_bag: embedding_bag,
    torch.layer_norm: layer_norm,
    torch.rms_norm: rms_norm,
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(
        (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as), shape_or_type_only
    ),
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution),
    **dict.fromkeys([torch.gru_cell, torch.lstm_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell], cell),
    **dict.fromkeys([torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu], recurrent),
    "expand": expand_to_batch,
    "any": per_row,
}
"""Rules by function; ``"expand"`` and ``"any"`` are the two that do not go by the function alone."""
