"""Owners through arithmetic: element by element, reductions along dimensions, and products.

Every rule says which operand elements meet in an element of the result; what meets has the smallest interval of owners
that holds all (:func:`stepinfluence.capture.owners.meet`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.body.sources import tensors_in
from stepinfluence.capture.owners.follow import Follower, Found, Part, Rule, arguments
from stepinfluence.capture.owners.indexing import lookup
from stepinfluence.capture.owners.intervals import Owners


def pointwise(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Operands broadcast against each other; each element by itself."""
    if len(args) + len(kwargs) == 1 and isinstance(result, tuple):  # torch.where(condition): positions, no data
        return [None] * len(result)
    parts = [f.part(v) for v in (*args, *kwargs.values())]
    first = result if isinstance(result, Tensor) else result[0]
    return f.combine(parts, first.shape)


def copied(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x.copy_(y)``: what was there before is gone."""
    part = f.part(args[1] if len(args) > 1 else kwargs["src"])
    return None if part is None else part.owners.broadcast(result.shape)


def everything(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """All elements of all operands meet in every element of the result."""
    return _whole(f, tensors_in((args, kwargs)), result)


def _whole(f: Follower, tensors: Sequence[Tensor], result: Any) -> Found:
    parts = [reduced(f.part(t), range(t.dim())) for t in tensors]
    flat = [None if p is None else Part(p.owners.squeezed(range(len(p.owners.shape))), p.strong) for p in parts]
    results = [result] if isinstance(result, Tensor) else list(result)
    return [f.combine(flat, r.shape) if isinstance(r, Tensor) else None for r in results]


def reduced(part: Part | None, dims: Sequence[int] | range) -> Part | None:
    return None if part is None else Part(part.owners.reduced(dims), part.strong)


def reduction(position: int = 1, default: int | None = None) -> Rule:
    """Functions that take ``dim`` at ``position``: what lies along it meets (all there is, where it is None)."""

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x, others = operands(args, kwargs)
        owners = f.owners(x)
        if others and func in BINARY_TOO:
            return pointwise(f, func, args, kwargs, result)
        if any(f.part(t) is not None for t in others):  # what ``diff`` is given to put before or behind
            return everything(f, func, args, kwargs, result)
        if owners is None:
            return None
        dims = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else default))
        if dims is None or isinstance(dims, bool) or dims == () or dims == []:
            dims = range(x.dim())
        if isinstance(dims, str) or (isinstance(dims, list | tuple) and any(isinstance(d, str) for d in dims)):
            return [f.not_known(r) for r in _as_list(result)]
        chosen = sorted({d % max(1, x.dim()) for d in ((dims,) if isinstance(dims, int) else dims)})

        def make() -> list[Owners]:
            kept = owners.reduced(chosen) if x.dim() else owners
            found = []
            for r in _as_list(result):
                small = kept if r.dim() == x.dim() else kept.squeezed(chosen)
                found.append(Owners(r.shape, small.lo, small.hi, small.along))
            return found

        shapes = tuple(tuple(r.shape) for r in _as_list(result))
        return f.remembered("reduce", owners, (tuple(chosen), shapes), make)  # type: ignore[no-any-return]

    return rule


def quantiles(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``quantile`` and ``nanquantile``: where several are asked for, the result has a first dimension for them."""
    q = args[1] if len(args) > 1 else kwargs["q"]
    one = reduction(2, None)
    if not isinstance(q, Tensor) or q.dim() == 0:
        return one(f, func, args, kwargs, result)
    if not len(q):
        return f.not_known(result)
    found = one(f, func, args, kwargs, result.detach()[0])
    each = [found] if isinstance(found, Owners) else found or ()
    return [o.broadcast(result.shape) for o in each if o is not None] or None


def operands(args: Any, kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """The first operand of a call, and the other tensors that it is given: those by name in the order of their names
    (``mat1``, ``mat2``)."""
    named = [kwargs[key] for key in sorted(kwargs) if key not in ("input", "out")]
    return (args[0] if args else kwargs["input"]), tensors_in((args[1:], named))


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def sorting(position: int) -> Rule:
    """``sort`` and ``topk``: where owners differ along the dimension, they move with the values."""
    plain = reduction(position, -1)

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x = args[0] if args else kwargs["input"]
        owners = f.owners(x)
        dim = kwargs.get("dim", args[position] if len(args) > position else -1)
        if owners is None or not x.dim() or isinstance(dim, bool) or not owners.varies(dim % x.dim()):
            return plain(f, func, args, kwargs, result)
        whole = owners.expanded(range(x.dim()))
        moved = whole.map(result[0].shape, lambda e, _: e.gather(dim % x.dim(), result[1])).compressed()
        return [moved, None]

    return rule


def last_dims(count: Callable[[Any, Any], int]) -> Rule:
    """Normalisation over the last dimensions: what is normalised together meets, and the weight and bias that data
    gave."""

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x, others = operands(args, kwargs)
        part = reduced(f.part(x), range(-count(args, kwargs), 0))
        given = [p for p in map(f.part, others) if p is not None]
        if given:
            return f.combine([part, *given], result.shape)
        if part is None:
            return None
        shape = result.shape
        make = lambda: Owners(shape, part.owners.lo, part.owners.hi, part.owners.along)  # noqa: E731
        return f.remembered("last", f.owners(x), (count(args, kwargs), tuple(shape)), make)  # type: ignore[no-any-return, arg-type]

    return rule


def _normalized(args: Any, kwargs: Any) -> int:
    return len(args[1] if len(args) > 1 else kwargs["normalized_shape"])


def per_sample(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Convolutions, group and instance norms, recurrent cells: all but the first dimension meets."""
    x = args[0] if args else kwargs["input"]
    others = [t for t in tensors_in((args[1:], kwargs)) if f.part(t) is not None]
    owners = f.owners(x)
    if owners is None or others:
        return everything(f, func, args, kwargs, result)
    if func in CONVOLUTIONS and x.dim() == CONVOLUTIONS[func] + 1:  # without a dimension of samples
        return everything(f, func, args, kwargs, result)
    kept = owners.reduced(range(1, x.dim()))
    return [_first_dim(kept, r) for r in _as_list(result)]


def _first_dim(kept: Owners, result: Tensor) -> Owners:
    sizes = (1,) * (result.dim() - 1)
    found = kept.map(result.shape, lambda ends, _: ends.reshape((ends.shape[0], *sizes)))
    found.along = kept.along
    return found


def spatial(dims: int) -> Rule:
    """Pooling and resampling: what lies along the last ``dims`` dimensions meets."""

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x = args[0] if args else kwargs["input"]
        owners = f.owners(x)
        if owners is None:
            return None
        kept = owners.reduced(range(x.dim() - min(dims or x.dim() - 2, x.dim()), x.dim()))
        return [Owners(r.shape, kept.lo, kept.hi, kept.along) for r in _as_list(result)]

    return rule


def batch_norm(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """In training mode all examples meet; with fixed statistics none do, where data gave no weight or bias."""
    names = ("input", "weight", "bias", "running_mean", "running_var", "training")
    given = arguments(names, args, kwargs)
    if any(f.part(t) is not None for t in operands(args, kwargs)[1]):
        return everything(f, func, args, kwargs, result)
    if not given.training:
        return f.owners(given.input)
    part = reduced(f.part(given.input), [d for d in range(given.input.dim()) if d != 1])
    return None if part is None else Owners(result.shape, part.owners.lo, part.owners.hi, part.owners.along)


def slopes(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``prelu``: element by element; its weight has a number for each channel."""
    x, others = operands(args, kwargs)
    if any(f.part(t) is not None for t in others):
        return everything(f, func, args, kwargs, result)
    return f.owners(x)


def patches(dim: int) -> Rule:
    """``im2col`` and ``col2im``: all but the first dimension meets, of a tensor of ``dim`` dimensions."""

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x, _ = operands(args, kwargs)
        return (per_sample if x.dim() == dim else everything)(f, func, args, kwargs, result)

    return rule


def classes(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Losses over classes: ``(N, C, ...)`` and targets ``(N, ...)``, or ``(C,)``; reduced to one number or not."""
    given = arguments(("input", "target"), args, kwargs)
    if result.dim() == 0 and given.input.dim() > 1:
        return everything(f, func, args, kwargs, result)
    axis = 1 if given.input.dim() > 1 else 0
    part = reduced(f.part(given.input), [axis])
    parts = [None if part is None else Part(part.owners.squeezed([axis]), part.strong)]
    target = f.part(given.target)
    if target is not None and given.target.shape == given.input.shape:  # probabilities
        target = Part(target.owners.reduced([axis]).squeezed([axis]), target.strong)
    return f.combine([*parts, target], result.shape)


def element_loss(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Losses by element, reduced to one number or not."""
    shape = torch.broadcast_shapes(*(t.shape for t in args[:2] if isinstance(t, Tensor)))
    if tuple(result.shape) == tuple(shape):
        return pointwise(f, func, args, kwargs, result)
    return everything(f, func, args, kwargs, result)


def as_complex(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Pairs of numbers, in the last dimension, are one."""
    part = reduced(f.part(args[0]), [-1])
    return None if part is None else part.owners.squeezed([-1])


def one_hot(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Each element becomes several, in a last dimension."""
    owners = f.owners(args[0])
    return None if owners is None else lookup(owners, result)


def functions_named(*names: str) -> list[Any]:
    """The functions of these names wherever torch has them, with their in-place and operator forms."""
    places = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg)
    forms = ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
    found = []
    for name in names:
        for form in forms:
            for place in places:
                function = getattr(place, form.format(name), None)
                if function is not None and callable(function) and not isinstance(function, type):
                    found.append(function)
    return found


def _tagged() -> list[str]:
    """Names of the operators that torch itself calls pointwise."""
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not hasattr(packet, "overloads"):
            continue
        if any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
            found.append(name.removeprefix("special_").strip("_"))
    return sorted(set(found))


CONVOLUTIONS = {
    getattr(torch, f"conv{t}{n}d"): n for n in (1, 2, 3) for t in ("", "_transpose") if hasattr(torch, f"conv{t}{n}d")
}  # fmt: skip
BINARY_TOO = set(functions_named("max", "min"))

POINTWISE = [
    *_tagged(), "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "and", "or", "xor", "invert",
    "bool", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "masked_fill", "copy", "fill",
    "zero", "normal", "uniform", "bernoulli", "exponential", "log_sigmoid", "logsigmoid", "hardswish", "rrelu",
    "isclose", "multiply", "subtract", "divide", "negative", "absolute", "greater", "greater_equal", "less",
    "less_equal", "not_equal", "complex", "polar", "float_power", "conj_physical", "floor_divide", "logaddexp",
    "nan_to_num", "rsub", "softplus", "bucketize", "true_divide", "pos", "abs", "random", "cauchy", "geometric", "fix",
    "arctan2", "arctan", "arcsin", "arccos", "arcsinh", "arccosh", "arctanh",
]  # fmt: skip

BY_VALUE = {*functions_named("topk", "sort")}
"""Functions whose rule looks at the values of their result."""

ARITHMETIC: dict[Any, Rule] = {
    **dict.fromkeys(functions_named(*POINTWISE), pointwise),
    **{
        function: reduction(position, default)
        for names, position, default in (
            (
                ("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "logsumexp",
                 "std", "var", "std_mean", "var_mean", "cumsum", "cumprod", "softmax", "log_softmax", "count_nonzero",
                 "nansum", "nanmean", "cummax", "cummin", "logcumsumexp", "median", "nanmedian"), 1, None,
            ),
            (("glu", "argsort", "mode"), 1, -1),
            (("kthvalue", "diff"), 2, -1),
            (("vector_norm",), 2, None),
            (("aminmax",), 9, None),
            (("msort",), 9, 0),
        )
        for function in functions_named(*names)
    },
    **dict.fromkeys(functions_named("topk"), sorting(2)),
    **dict.fromkeys(functions_named("sort"), sorting(1)),
    **dict.fromkeys(functions_named("quantile", "nanquantile"), quantiles),
    **dict.fromkeys(functions_named("prelu"), slopes),
    torch._C._nn.im2col: patches(4),
    torch._C._nn.col2im: patches(3),
    Tensor.copy_: copied,
    torch.layer_norm: last_dims(_normalized),
    torch.rms_norm: last_dims(_normalized),
    **dict.fromkeys(functions_named("multinomial"), last_dims(lambda a, k: 1)),
    **dict.fromkeys([*CONVOLUTIONS, torch.group_norm, torch.instance_norm], per_sample),
    **dict.fromkeys([torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell], everything),
    torch.batch_norm: batch_norm,
    **{
        function: spatial(dims)
        for dims in (1, 2, 3)
        for function in functions_named(
            f"avg_pool{dims}d", f"max_pool{dims}d", f"adaptive_avg_pool{dims}d", f"adaptive_max_pool{dims}d",
            f"max_pool{dims}d_with_indices",
        )
    },
    F.interpolate: spatial(0),
    F.one_hot: one_hot,
    torch.view_as_real: one_hot,
    torch.view_as_complex: as_complex,
    **dict.fromkeys(functions_named("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"), classes),
    **dict.fromkeys(
        functions_named("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
               "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss", "poisson_nll_loss"),
        element_loss,
    ),
    **dict.fromkeys(functions_named("outer", "ger", "cdist", "bilinear", "kron", "inner", "trace"), everything),
}  # fmt: skip
