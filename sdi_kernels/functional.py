"""The public sketch functions: checked, any leading dimensions, accumulating or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sdi_kernels import _checks, ops
from sdi_kernels.plan import Route, plan_linear
from sdi_kernels.sketches import CountSketch, TensorSketch
from sdi_kernels.steps import sketch_steps


def _merge_leading(value: Tensor) -> Tensor:
    """``(..., T, d) -> (rows, T, d)``; counts the rows itself, since -1 is ambiguous where T is 0."""
    return value.reshape(math.prod(value.shape[:-2]), *value.shape[-2:])


def _finish(
    out: Tensor | None,
    shape: tuple[int, ...],
    inputs: tuple[Tensor, ...],
    create: Callable[..., Tensor],
    add: Callable[..., None],
    *arguments: Any,
) -> Tensor:
    """A new sketch of ``shape`` (..., m) by ``create``, or ``out`` after ``add``, two operators of these arguments."""
    if out is None:
        return create(*arguments).view(shape)
    return _accumulate(out, shape, inputs, add, *arguments)


def _accumulate(
    out: Tensor, shape: tuple[int, ...], inputs: tuple[Tensor, ...], add: Callable[..., None], *arguments: Any
) -> Tensor:
    """Add a sketch of ``shape`` (..., m) to ``out``, which may be a strided slice of a larger buffer."""
    buffer = _checks.output_buffer(out, shape, _checks.sketch_dtype(*inputs), inputs[0].device)
    given = [x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
    # Leading dimensions that cannot be merged in place go through a copy.
    try:
        flat = buffer.view(-1, shape[-1])
    except RuntimeError:
        _checks.apart(buffer, inputs)
        flat = buffer.reshape(-1, shape[-1])
        ops.add_to(flat, add, *given)
        return buffer.copy_(flat.view(buffer.shape))
    ops.add_to(flat, add, *given)
    return buffer


def sketch_linear_grads(
    activations: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor],
    sketch: TensorSketch,
    *,
    route: Route = "auto",
    metric: Tensor | None = None,
    steps: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """TensorSketch of the weight gradients of a linear layer, without forming them in memory (paper, eq. 4, Alg. 1).

    One sketch per leading index, summed over tokens: ``TS(sum_l grad_outputs[..., l, :] (x) activations[..., l, :])``;
    with ``metric``, ``TS(metric * sum_l ...)``.

    The uses of a looped layer come as lists, one pair of tensors for each, and are worked off by one operator (on a GPU
    one launch) that reads them where they lie. Sketches of pair ``k`` are added to
    ``out[rows[k] : rows[k] + n_k, steps[k]]``; pairs with the same ``steps`` add up where their rows meet.

    Args:
        activations: the layer's input, ``(..., T, d_in)``; float32, bfloat16, float16 or float64. Or a list of
            ``(n_k, T_k, d_in)``, all of one dtype; a pair's rows and tokens are its own.
        grad_outputs: gradient at the layer's output, ``(..., T, d_out)``, same leading dimensions. Or a list of
            ``(n_k, T_k, d_out)``.
        sketch: the tables for this weight.
        route: ``"auto"`` (planner), ``"direct"``, ``"fft"`` or ``"shear"`` (:mod:`sdi_kernels.plan`).
        metric: optional ``(d_out, d_in)``, any floating dtype, multiplied elementwise into every gradient (that of
            an optimizer); not differentiable, and by the ``direct`` route only, which ``"auto"`` then takes. A metric
            that is an outer product is cheaper multiplied into ``grad_outputs`` and ``activations`` beforehand.
        steps: for lists, the column of ``out`` that each pair is added to; 0, 1, 2, ... if not given.
        rows: for lists, the first row of ``out`` of each pair; all 0 if not given.
        out: optional buffer ``(..., m)``, for lists ``(B, S, m)``, to accumulate into (it is returned); not
            differentiable.

    Returns:
        ``(..., m)``, for lists ``(B, S, m)`` as small as holds every pair; float32 (float64 if an input is).
        Differentiable in all activations and gradients where ``out`` is not given.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, ``route`` is unknown or cannot take this sketch, or
            it is ``"fft"`` or ``"shear"`` with ``metric``.
    """
    _checks.instance("sketch", sketch, TensorSketch)
    if not isinstance(activations, Tensor) and isinstance(activations, Sequence):
        return sketch_steps(
            activations, grad_outputs, sketch, route=route, metric=metric, steps=steps, rows=rows, out=out
        )
    if steps is not None or rows is not None:
        raise ValueError("steps, rows: got them with tensors; pass lists of tensors, or slice out")
    a = _checks.float_tensor("activations", activations, min_dim=2)
    g = _checks.float_tensor("grad_outputs", grad_outputs, min_dim=2)
    if a.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            f"grad_outputs: got leading shape {tuple(g.shape[:-1])}, activations have {tuple(a.shape[:-1])}; "
            "both must be (..., T) over the same tokens"
        )
    _checks.last_dim("activations", a, sketch.d_in, "d_in")
    _checks.last_dim("grad_outputs", g, sketch.d_out, "d_out")
    _checks.same_device(activations=a, grad_outputs=g)
    lead, m = a.shape[:-2], sketch.m
    a3, g3 = _merge_leading(a), _merge_leading(g)
    tables = sketch.tables(a.device)
    entries: Tensor | None = None
    if metric is not None:
        entries = _checks.entry_metric(metric, sketch.d_out, sketch.d_in, route, activations=a)
        entries = entries.to(_checks.sketch_dtype(a, g))
        route = "direct" if route == "auto" else route
    chosen = plan_linear(a3.shape[0], a3.shape[1], sketch, a.device, route, dtype=a.dtype).route
    return _finish(out, (*lead, m), (a, g), ops.linear_sketch, ops.linear_sketch_, a3, g3, tables, m, chosen, entries)


def sketch_matrix_grads(
    grads: Tensor, sketch: TensorSketch, *, metric: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """TensorSketch of gradients that are already there as matrices (paper, Lemma 3).

    For parameters that are not used as a linear map; costs one pass over ``grads``.

    Args:
        grads: ``(..., d_out, d_in)``.
        sketch: the tables for this parameter.
        metric: optional ``(d_out, d_in)``, any floating dtype, multiplied elementwise into every matrix (an optimizer's
            metric); not differentiable.
        out: optional buffer ``(..., m)`` to accumulate into.

    Returns:
        ``(..., m)``, float32 (float64 if ``grads`` is); differentiable where ``out`` is not given.

    Raises:
        TypeError, ValueError: shape, dtype or device does not fit.
    """
    _checks.instance("sketch", sketch, TensorSketch)
    g = _checks.float_tensor("grads", grads, min_dim=2)
    _checks.last_dim("grads", g, sketch.d_in, "d_in")
    if g.shape[-2] != sketch.d_out:
        raise ValueError(
            f"grads: got {g.shape[-2]} rows, but the sketch was made for d_out={sketch.d_out}; "
            f"pass shape (..., {sketch.d_out}, {sketch.d_in}) or make the sketch for this parameter"
        )
    entries: Tensor | None = None
    if metric is not None:
        entries = _checks.entry_metric(metric, sketch.d_out, sketch.d_in, "auto", grads=g).to(_checks.sketch_dtype(g))
    lead, m = g.shape[:-2], sketch.m
    g3 = _merge_leading(g)
    tables = sketch.tables(g.device)
    return _finish(out, (*lead, m), (g,), ops.matrix_sketch, ops.matrix_sketch_, g3, tables, m, entries)


def sketch_embedding_grads(
    token_ids: Tensor, grad_outputs: Tensor, sketch: TensorSketch, *, out: Tensor | None = None
) -> Tensor:
    """TensorSketch of the weight gradients of an embedding: a signed add at an offset per token, no transform.

    Args:
        token_ids: ``(..., T)``, integers in ``[0, d_out)``.
        grad_outputs: gradient at the embedding's output, ``(..., T, d_in)``.
        sketch: the tables of the embedding's weight: ``d_out`` = vocabulary, ``d_in`` = embedding width.
        out: optional buffer ``(..., m)`` to accumulate into.

    Returns:
        ``(..., m)``, float32 (float64 if ``grad_outputs`` is); differentiable in ``grad_outputs``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
        IndexError: a token id lies outside the vocabulary (CPU; a GPU kernel makes that row NaN).
    """
    _checks.instance("sketch", sketch, TensorSketch)
    g = _checks.float_tensor("grad_outputs", grad_outputs, min_dim=2)
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in _checks.INDEX_DTYPES:
        got = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise TypeError(f"token_ids: got {got}; pass an integer tensor of shape (..., T)")
    if token_ids.shape != g.shape[:-1]:
        raise ValueError(
            f"token_ids: got shape {tuple(token_ids.shape)}, grad_outputs have {tuple(g.shape[:-1])} tokens; "
            "both must be (..., T)"
        )
    _checks.last_dim("grad_outputs", g, sketch.d_in, "d_in")
    _checks.same_device(token_ids=token_ids, grad_outputs=g)
    lead, m = g.shape[:-2], sketch.m
    g3 = _merge_leading(g)
    ids = token_ids.reshape(g3.shape[:2]).long()
    tables = sketch.tables(g.device)
    return _finish(out, (*lead, m), (g,), ops.embedding_sketch, ops.embedding_sketch_, ids, g3, tables, m)


def sketch_vector_grads(grads: Tensor, sketch: CountSketch, *, out: Tensor | None = None) -> Tensor:
    """CountSketch of the token-summed gradients of a vector parameter: bias, norm gain (paper, eq. 4, Alg. 1).

    Args:
        grads: per-token gradients ``(..., T, d)`` (``T = 1`` where they are summed already).
        sketch: the tables for this vector.
        out: optional buffer ``(..., m)`` to accumulate into.

    Returns:
        ``(..., m)``, float32 (float64 if ``grads`` is); differentiable where ``out`` is not given.

    Raises:
        TypeError, ValueError: shape, dtype or device does not fit.
    """
    _checks.instance("sketch", sketch, CountSketch)
    g = _checks.float_tensor("grads", grads, min_dim=2)
    _checks.last_dim("grads", g, sketch.d, "d")
    lead, m = g.shape[:-2], sketch.m
    g3 = _merge_leading(g)
    tables = sketch.tables(g.device)
    return _finish(out, (*lead, m), (g,), ops.vector_sketch, ops.vector_sketch_, g3, tables, m)


def sketch_scaled_vector_grads(
    grads: Tensor,
    factors: Tensor,
    sketch: CountSketch,
    *,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """CountSketch of ``sum_l grads[l] * (factors[l] - center[l]) * scale[l]``: the gain of a normalisation or a gate.

    For LayerNorm pass its input as ``factors`` with the tokens' ``mean`` and ``rstd``; for RMSNorm ``rstd`` alone.

    Args:
        grads: gradients at the layer's output, ``(..., T, d)``.
        factors: what the vector multiplies, up to shift and scale, ``(..., T, d)``.
        sketch: the tables for this vector.
        center, scale: per token, ``(..., T)``; 0 and 1 if not given.
        out: optional buffer ``(..., m)`` to accumulate into.

    Returns:
        ``(..., m)``, float32 (float64 if an input is); differentiable where ``out`` is not given.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.instance("sketch", sketch, CountSketch)
    g = _checks.float_tensor("grads", grads, min_dim=2)
    x = _checks.float_tensor("factors", factors, min_dim=2)
    _checks.last_dim("grads", g, sketch.d, "d")
    if x.shape != g.shape:
        raise ValueError(f"factors: got shape {tuple(x.shape)}, grads have {tuple(g.shape)}; pass equal shapes")
    _checks.same_device(grads=g, factors=x)
    per_token: list[Tensor | None] = []
    for name, value in (("center", center), ("scale", scale)):
        if value is not None and (not isinstance(value, Tensor) or value.shape != g.shape[:-1]):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: got {got}; pass one number per token, shape {tuple(g.shape[:-1])}")
        per_token.append(value)
    if out is None:
        dtype = _checks.sketch_dtype(g, x)
        values = x.to(dtype)
        if center is not None:
            values = values - center.unsqueeze(-1)
        if scale is not None:
            values = values * scale.unsqueeze(-1)
        return sketch_vector_grads(g.to(dtype) * values, sketch)
    g3, x3 = _merge_leading(g), _merge_leading(x)
    shift, gain = (None if v is None else v.reshape(g3.shape[:2]) for v in per_token)
    tables, m = sketch.tables(g.device), sketch.m
    shape = (*g.shape[:-2], m)
    return _accumulate(out, shape, (g, x), ops.scaled_vector_sketch_, g3, x3, shift, gain, tables, m)
