"""How each operation hands its parameters' gradients over: one rule per kind of use.

A rule takes ``(interceptor, func, args, kwargs)`` of a call in which a source meets data. It computes the operation
with the parameters detached, taps the result, and returns it; or it returns ``NotImplemented`` if the call is not of
the form it knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.body.sources import Source
from stepinfluence.capture.owners import Owners
from stepinfluence.capture.owners.calls import EXPANSIONS, GROUPED, changes_in_place
from stepinfluence.capture.owners.indexing import items_of
from stepinfluence.capture.owners.rows import gains_examples
from stepinfluence.capture.uses.bags import embedding_bag
from stepinfluence.capture.uses.composed import (
    batched_product,
    convolution,
    einsum,
    grouped_product,
    transposed_convolution,
)
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.capture.uses.recurrent import cell, recurrent

Rule: TypeAlias = Callable[[Interceptor, Any, tuple[Any, ...], dict[str, Any]], Any]


def linear(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.linear(x, W, b)``."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if it.source(x) is not None:
        return NotImplemented
    output = F.linear(x, it.detached(weight), it.detached(bias))
    on_weight, on_bias = it.source(weight), it.source(bias)
    use = it.use(func, it.owners.of(x, 1), on_weight, on_bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        if on_weight is not None:
            it.sink.linear(on_weight, use, saved[0].conj(), grad)  # of complex maps; a real tensor is its own
        if on_bias is not None:
            it.sink.vector(on_bias, use, grad)

    return it.tap(output, use, receive, *(() if on_weight is None else (x,)))


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
    output = torch.matmul(it.detached(left), it.detached(right))
    if on_left is not None:
        use = it.use(func, it.owners.of_columns(right), source)
    else:
        use = it.use(func, it.owners.of(left, 1), source)
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


def addmm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``addmm(b, x, P)``, as Hugging Face's Conv1D calls it."""
    if len(args) != 3 or kwargs or changes_in_place(func, kwargs):
        return NotImplemented
    bias, x, weight = args
    on_weight, on_bias = it.source(weight), it.source(bias)
    if it.source(x) is not None or bias.dim() != 1:
        return NotImplemented
    output = torch.addmm(it.detached(bias), x, it.detached(weight))
    use = it.use(func, it.owners.of(x, 1), on_weight, on_bias)

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
    options = (given.get(n, False) for n in ("scale_grad_by_freq", "sparse"))
    return _lookup(it, func, given["weight"], given["indices"], given.get("padding_idx", -1), *options)


def getitem(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P[ids]`` with an integer tensor: a lookup."""
    table, index = args
    source = it.source(table)
    if source is not None and _picks_one(index):
        # Which part of the parameter it is does not depend on anything that gradients flow through.
        items = tuple(int(i) if isinstance(i, Tensor) else i for i in items_of(index))
        return it.batch_free(func, (table, items), {}, [source])
    if source is not None and any(i.dtype == torch.bool for i in _tensors(index)):
        return it.batch_free(func, args, {}, [source])  # whichever rows are picked, those of others have no gradient
    if len(items := items_of(index)) == 1:
        (index,) = items
    if it.source(table) is None or not isinstance(index, Tensor) or index.dtype == torch.bool:
        return NotImplemented
    return _lookup(it, func, table, index, -1, False)


def _tensors(index: Any) -> list[Tensor]:
    return [i for i in items_of(index) if isinstance(i, Tensor)]


def _picks_one(index: Any) -> bool:
    """Whether an index is made of whole numbers, slices and 0-d tensors: one expert of many, say."""
    items = items_of(index)
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


def _lookup(
    it: Interceptor, func: Any, table: Any, ids: Tensor, padding: int, by_frequency: bool, sparse: bool = False
) -> Any:
    source = it.source(table)
    if source is None or source.tensor.dim() < 2 or it.source(ids) is not None:
        return NotImplemented
    if by_frequency:
        raise it.unsupported([source], func, "scale_grad_by_freq mixes the examples of a batch")
    owners = it.owners.of(ids)
    # Negative indices of plain indexing count from the end; as a lookup they are wrapped.
    ids = torch.where(ids < 0, ids + len(table), ids) if func is not torch.embedding else ids
    row = tuple(table.shape[1:])
    output = torch.embedding(it.detached(table).flatten(1), ids, padding, False, sparse)
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
    output, *kept = _normalized(x, shape, it.detached(weight), it.detached(bias), eps)

    def statistics(flat: Tensor) -> tuple[Tensor, Tensor]:
        # By the fused normalisation, whose result is dropped: several times faster on CPUs than var_mean.
        _, mean, rstd = torch.native_layer_norm(flat, flat.shape[-1:], None, None, eps)
        return mean.squeeze(-1), rstd.squeeze(-1)

    return _norm_tap(it, func, output, x, len(shape), it.source(weight), it.source(bias), statistics, kept)


def _normalized(x: Tensor, shape: tuple[int, ...], *rest: Any) -> tuple[Tensor, ...]:
    """A layer norm, with the mean and deviation that it took where it took them in the precision of its input."""
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        return (torch.layer_norm(x, shape, *rest),)
    output, mean, rstd = torch.native_layer_norm(x, shape, *rest)
    return output, mean.detach(), rstd.detach()


def rms_norm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.rms_norm(x, shape, W, eps)``, to which ``F.rms_norm`` comes down."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    x, shape, eps, weight = given["input"], tuple(given["normalized_shape"]), given.get("eps"), given.get("weight")
    if it.source(x) is not None:
        return NotImplemented
    output = torch.rms_norm(x, shape, it.detached(weight), eps)
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
    kept: Sequence[Tensor] = (),
) -> Any:
    """``kept``: the mean and deviation of each token, if they are known; else they are taken again."""
    use = it.use(func, it.owners.of(x, feature_dims), weight, bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        # In single precision at least, as the normalisation itself does whatever the dtype of its input.
        precise = torch.promote_types(grad.dtype, torch.float32)
        data, g = (t.to(precise).flatten(t.dim() - feature_dims) for t in (saved[0], grad))
        if weight is not None:
            # Not the normalised activations, which would be kept for every step.
            taken = [t.flatten(t.dim() - feature_dims).squeeze(-1) for t in saved[1:]] or statistics(data)
            it.sink.scaled(weight, use, g, data, *taken)
        if bias is not None:
            it.sink.vector(bias, use, g)

    return it.tap(output, use, receive, x, *kept)


def elementwise(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcast arithmetic: sources are expanded to the full shape, so that autograd does not sum over examples."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if kwargs.get("out") is not None or (changes_in_place(func, kwargs) and it.source(args[0]) is not None):
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    others = [t for t in tensors if it.source(t) is None and (t.is_floating_point() or t.is_complex())]
    owners = it.owners.joint([t for t in tensors if it.source(t) is None], shape)

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
    if it.is_one_for_all(x, _tensors(index)):
        return it.batch_free(func, args, {}, [source])  # a matrix that is filled from a vector, at kept places
    places = x.detach()[index]
    part = it.owners.after(Tensor.__getitem__, (x, index), places)
    func(x, index, expanded(it, func, source, tuple(places.shape), part))
    return x


def index_put(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.index_put(index, P)`` and its form in place: as ``x[index] = P``."""
    given = dict(zip(("input", "indices", "values", "accumulate"), args, strict=False)) | kwargs
    x = given["input"]
    if given.get("accumulate", False) or it.source(x) is not None or kwargs.get("out") is not None:
        return NotImplemented
    with it:
        written = x if changes_in_place(func, kwargs) else x.clone()
        written[tuple(given["indices"])] = given["values"]
    return written


def expand_to_batch(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P.expand(B, ...)``, ``P.repeat(B, 1, ...)``: the result has a row per example and counts as data."""
    if func not in EXPANSIONS or not args:
        return NotImplemented
    value = args[0]
    source = it.source(value)
    if source is None:
        return NotImplemented
    shape = tuple(func(value.detach(), *args[1:], **kwargs).shape)
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    likely = (*it.owners.example_dims, *range(max(1, len(shape) - 1)))
    dim = gains_examples(value.shape, shape, it.owners.batch_size, likely)
    if dim is None:
        return NotImplemented
    if any(a not in (1, s) for a, s in zip(aligned, shape, strict=True)):  # tiled along other dimensions
        return NotImplemented
    owners = Owners.along_dim(shape, dim, value.device)
    result = expanded(it, func, source, shape, owners)
    # A repeated tensor has memory of its own: the model may change it in place.
    result = result.clone(memory_format=torch.contiguous_format) if func is Tensor.repeat else result
    it.owners.follower.note(result, owners, tapped=True)
    it.owners.doubted = True
    return result


def attention(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.multi_head_attention_forward``: looked inside."""
    return it.look_inside(func, args, kwargs)


def broadcast(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``broadcast_tensors``: each by itself to the shape of all."""
    tensors = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    with it:
        return tuple(t.expand(shape) for t in tensors)


def added_product(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``baddbmm(b, x, P)``: the product, scaled, and what is added to it."""
    names = ("input", "batch1", "batch2")
    given: dict[str, Any] = {"beta": 1, "alpha": 1, **dict(zip(names, args, strict=False)), **kwargs}
    if changes_in_place(func, kwargs) or len(args) > len(names):
        return NotImplemented
    with it:
        product = torch.bmm(given["batch1"], given["batch2"])
        product = product if given["alpha"] == 1 else product * given["alpha"]
        if given["beta"] == 0:  # then it may hold anything, NaN too
            return product
        return product + (given["input"] if given["beta"] == 1 else given["input"] * given["beta"])


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
    **dict.fromkeys(_named("baddbmm"), added_product),
    torch.einsum: einsum,
    **dict.fromkeys(GROUPED, grouped_product),
    torch.embedding: embedding,
    Tensor.__getitem__: getitem,
    Tensor.__setitem__: setitem,
    **dict.fromkeys(_named("index_put"), index_put),
    **dict.fromkeys(_named("index_select"), index_select),
    torch.embedding_bag: embedding_bag,
    torch.layer_norm: layer_norm,
    torch.rms_norm: rms_norm,
    **dict.fromkeys(ELEMENTWISE, elementwise),
    torch.broadcast_tensors: broadcast,
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution),
    **dict.fromkeys([torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d], transposed_convolution),
    **dict.fromkeys([torch.gru_cell, torch.lstm_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell], cell),
    **dict.fromkeys([torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu], recurrent),
}
"""Rules by function. Two do not go by the function alone: :func:`expand_to_batch`, and ``per_row`` for any other."""
