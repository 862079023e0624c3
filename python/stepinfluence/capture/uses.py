"""How each operation hands its parameters' gradients over: one rule per kind of use.

A rule takes ``(interceptor, func, args, kwargs)`` of a call in which a source meets data. It computes the operation
with the parameters detached, taps the result, and returns it; or it returns ``NotImplemented`` if the call is not of
the form it knows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stepinfluence.capture.bags import bag_rule
from stepinfluence.capture.interceptor import EXPANSIONS, OUTSIDE, Interceptor, changes_in_place
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
    step = it.step(func, weight, bias)
    recorder = it.recorder

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        if weight is not None:
            recorder.linear(weight, step, saved[0].conj(), grad)  # of complex maps; a real tensor is its own
        if bias is not None:
            recorder.vector(bias, step, grad)

    return it.tap(output, step, receive, *(() if weight is None else (x,)))


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
        return NotImplemented
    if right.dim() == 1 and on_left is not None:
        return NotImplemented
    output = torch.matmul(_detached(it, left), _detached(it, right))
    step = it.step(func, source)
    recorder, use = it.recorder, source

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        data = saved[0].conj()
        if on_left is not None:
            recorder.linear(use, step, data.transpose(-1, -2), grad.transpose(-1, -2))
        elif use.tensor.dim() == 2:  # the parameter's first index runs over the input: roles are swapped
            recorder.linear(use, step, grad, data.to(grad.dtype))
        else:
            recorder.vector(use, step, data.to(grad.dtype) * grad.unsqueeze(-1))

    return it.tap(output, step, receive, right if on_left is not None else left)


def addmm(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``addmm(b, x, P)``, as Hugging Face's Conv1D calls it."""
    if len(args) != 3 or kwargs or changes_in_place(func, kwargs):
        return NotImplemented
    bias, x, weight = args
    on_weight, on_bias = it.source(weight), it.source(bias)
    if it.source(x) is not None or (on_bias is None and it.source(bias) is not None) or bias.dim() != 1:
        return NotImplemented
    output = torch.addmm(_detached(it, bias), x, _detached(it, weight))
    step = it.step(func, on_weight, on_bias)
    recorder = it.recorder

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        if on_weight is not None:
            recorder.linear(on_weight, step, grad, saved[0].conj().to(grad.dtype))
        if on_bias is not None:
            recorder.vector(on_bias, step, grad)

    return it.tap(output, step, receive, *(() if on_weight is None else (x,)))


def embedding(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.embedding(W, ids, padding_idx, scale_grad_by_freq, sparse)``, to which ``F.embedding`` comes down."""
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    padding = given.get("padding_idx", -1)
    return _lookup(it, func, given["weight"], given["indices"], padding, given.get("scale_grad_by_freq", False))


def getitem(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P[ids]`` with an integer tensor: a lookup."""
    table, index = args
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if it.source(table) is None or not isinstance(index, Tensor) or index.dtype == torch.bool:
        return NotImplemented
    return _lookup(it, func, table, index, -1, False)


def index_select(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``P.index_select(0, ids)``: a lookup."""
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    if it.source(given["input"]) is None or given["dim"] != 0:
        return NotImplemented
    return _lookup(it, func, given["input"], given["index"], -1, False)


def _lookup(it: Interceptor, func: Any, table: Any, ids: Tensor, padding: int, by_frequency: bool) -> Any:
    source = it.source(table)
    if source is None or source.tensor.dim() != 2 or it.source(ids) is not None:
        return NotImplemented
    if by_frequency:
        raise it.unsupported([source], func, "scale_grad_by_freq mixes the examples of a batch")
    # Negative indices of plain indexing count from the end; as a lookup they are wrapped.
    ids = torch.where(ids < 0, ids + len(table), ids) if func is not torch.embedding else ids
    output = torch.embedding(table.detach(), ids)
    step = it.step(func, source)
    recorder, use = it.recorder, source

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        recorder.embedding(use, step, saved[0], grad, padding if padding >= 0 else None)

    return it.tap(output, step, receive, ids)


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
    step = it.step(func, weight, bias)
    recorder = it.recorder

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        # In single precision at least, as the normalisation itself does whatever the dtype of its input.
        precise = torch.promote_types(grad.dtype, torch.float32)
        data, g = (t.to(precise).flatten(t.dim() - feature_dims) for t in (saved[0], grad))
        if weight is not None:
            # Mean and deviation again, which costs less than keeping normalised activations of every step.
            recorder.scaled(weight, step, g, data, *statistics(data))
        if bias is not None:
            recorder.vector_or_dense(bias, step, g)

    return it.tap(output, step, receive, x)


def elementwise(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcast arithmetic: sources are expanded to the full shape, so that autograd does not sum over examples."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if kwargs.get("out") is not None or (it.source(args[0]) is not None and changes_in_place(func, kwargs)):
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    others = [t for t in tensors if it.source(t) is None and (t.is_floating_point() or t.is_complex())]
    recorder = it.recorder

    def expand(value: Any) -> Any:
        source = it.source(value)
        if source is None:
            return value
        if it.routed and any(n != 1 for n in value.shape[:-1]):
            raise it.unsupported(
                [source], func, "rows of its input were picked by the data; only a vector can meet them"
            )
        step = it.step(func, source)
        result = it.tap_expanded(source, step, lambda grad, _: recorder.expanded(source, step, grad), shape)
        if value.dim() == 0 and others:
            # A 0-d operand does not take part in type promotion; expanded, it would.
            result = result.to(torch.result_type(others[0], value))
        return result

    return func(*(expand(v) for v in args), **{k: expand(v) for k, v in kwargs.items()})


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
    if not gains_examples(value.shape, shape, it.batch_size, it.example_dims):
        return NotImplemented
    if any(a not in (1, s) for a, s in zip(aligned, shape, strict=True)):  # tiled along other dimensions
        return NotImplemented
    step = it.step(func, source)
    recorder, use = it.recorder, source
    expanded = it.tap_expanded(source, step, lambda grad, _: recorder.expanded(use, step, grad), shape)
    # A repeated tensor has memory of its own: the model may change it in place.
    return expanded.clone(memory_format=torch.contiguous_format) if func is Tensor.repeat else expanded


def attention(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.multi_head_attention_forward``: looked inside, where activations are ``(tokens, B, features)``."""
    query = args[0] if args else kwargs["query"]
    if query.dim() != 3 or it.routed:
        return NotImplemented
    with it.sequence_first(query.shape[1]):
        return it.look_inside(func, args, kwargs)


def shape_or_type_only(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.to(P)``, ``x.type_as(P)``, ``x.expand_as(P)``: of the parameter only its shape or dtype counts."""
    if it.source(args[0]) is not None:
        return NotImplemented
    return _without_capture(it, func, args, kwargs)


def per_example(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operation: mapped over micro-batches of one, with the parameter expanded per example.

    The per-example gradient of the parameter is materialised for this one use. The result is compared with the plain
    operation's, so that an operation which mixes examples is refused.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sources = [s for s in map(it.source, leaves) if s is not None]
    size, recorder = it.batch_size, it.recorder
    if it.routed:
        raise it.unsupported(sources, func, "rows of its input were picked by the data, and may be of any example")
    if size is None:
        raise it.unsupported(sources, func, "the batch size is not known before the loss; pass batches of tensors")
    if changes_in_place(func, kwargs):
        raise it.unsupported(sources, func, "it writes to a tensor in place")
    plain = _without_capture(it, func, args, kwargs)
    if not isinstance(plain, Tensor):
        raise it.unsupported(sources, func, "it gives several results, and its rule is not known")
    step = it.step(func, *sources)
    mapped: list[Any] = []
    where: list[int] = []
    for k, leaf in enumerate(leaves):
        source = it.source(leaf)
        if source is not None:

            def receive(grad: Tensor, _: tuple[Tensor, ...], source: Source = source) -> None:
                recorder.dense(source, step, grad)

            mapped.append(it.tap_expanded(source, step, receive, (size, *leaf.shape)))
            where.append(k)
        elif isinstance(leaf, Tensor) and leaf.shape[:1] == (size,) and not it.is_constant(leaf):
            mapped.append(leaf.unsqueeze(1))
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
            result = torch.func.vmap(one, randomness="error")(*mapped).squeeze(1)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if step == OUTSIDE or in_backward():  # left out; a recomputation comes here for those only
            return plain
        raise it.unsupported(sources, func, f"it does not map over examples: {str(error).splitlines()[0]}") from error
    if result.shape != plain.shape:
        raise it.unsupported(sources, func, "its result has no dimension for the examples")
    if not torch.allclose(result.detach(), plain.detach(), rtol=1e-3, atol=1e-5):
        raise it.unsupported(sources, func, "it mixes the examples of a batch")
    return result


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
    **dict.fromkeys(_named("matmul", "mm"), matmul),
    **dict.fromkeys(_named("addmm"), addmm),
    torch.embedding: embedding,
    Tensor.__getitem__: getitem,
    **dict.fromkeys(_named("index_select"), index_select),
    torch.embedding_bag: bag_rule(_lookup),
    torch.layer_norm: layer_norm,
    torch.rms_norm: rms_norm,
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(
        (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as), shape_or_type_only
    ),
    "expand": expand_to_batch,
    "any": per_example,
}
"""Rules by function; ``"expand"`` and ``"any"`` are the two that do not go by the function alone."""
