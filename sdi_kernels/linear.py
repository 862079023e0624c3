"""``sketched_linear``: a linear layer whose backward pass sketches instead of forming the weight gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdi_kernels import _checks, ops
from sdi_kernels.plan import Route, plan_linear
from sdi_kernels.sketches import CountSketch, TensorSketch


@torch.library.custom_op("sdi_kernels::sketched_linear", mutates_args=())
def _sketched_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tables: Sequence[Tensor],
    bias_out: Tensor | None,
    bias_tables: Sequence[Tensor],
    route: str,
) -> Tensor:
    return F.linear(x, weight, bias)


@_sketched_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.out, tables, ctx.bias_out, bias_tables, ctx.route = inputs
    # The buffers are outputs of the backward pass, not values it reads: saved like the inputs they would fail
    # the version check as soon as another loop step had written to a slice of the same buffer.
    ctx.save_for_backward(x, weight, *tables, *bias_tables)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *tables = ctx.saved_tensors
    tables, bias_tables = tables[:6], tables[6:]
    rows, tokens = x.shape[0], math.prod(x.shape[1:-1])
    g3 = grad.reshape(rows, tokens, grad.shape[-1])
    x3 = x.reshape(rows, tokens, x.shape[-1])
    ops.linear_sketch_(ctx.out, x3, g3, tables, ctx.out.shape[-1], ctx.route)
    if ctx.bias_out is not None:
        ops.vector_sketch_(ctx.bias_out, g3, bias_tables, ctx.bias_out.shape[-1])
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    return grad_x, None, None, None, ops.NO_TABLE_GRADS, None, [None] * len(bias_tables), None


_sketched_linear.register_autograd(_backward, setup_context=_setup)


def _autocast(value: Tensor) -> Tensor:
    """``value`` as autocast would hand it to F.linear: cast where autograd sees it, not in the operator."""
    device = value.device.type
    try:  # torch.amp.is_autocast_available would say, but torch 2.11 cannot compile it
        enabled = torch.is_autocast_enabled(device)
    except RuntimeError:  # there is no autocast for this kind of device, such as meta
        enabled = False
    if not enabled or value.dtype == torch.float64:
        return value
    return value.to(torch.get_autocast_dtype(device))


def sketched_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sketch: TensorSketch,
    out: Tensor,
    bias_sketch: CountSketch | None = None,
    bias_out: Tensor | None = None,
    route: Route = "auto",
) -> Tensor:
    """``F.linear(x, weight, bias)`` whose backward adds per-example gradient sketches to ``out`` (paper, Alg. 1).

    The backward pass computes the gradient of ``x``, accumulates the sketch of ``(grad_output, x)`` into
    ``out`` and gives **no gradient** to ``weight`` and ``bias``: the weight-gradient GEMM is never run. For a looped
    layer pass ``out=buffer[:, t]`` at loop step ``t``; uses that share a buffer add up. A function recomputed by
    ``torch.utils.checkpoint`` closes over its buffer: as an argument, checkpoint would refuse it once written to.

    Args:
        x: ``(B, ..., d_in)``; the first dimension counts the examples.
        weight: ``(d_out, d_in)``; let it require grad, so that the backward pass reaches this layer.
        bias: ``(d_out,)`` or None.
        sketch: tables for the weight.
        out: float32 buffer ``(B, m)``, any strides, accumulated into.
        bias_sketch, bias_out: the same for the bias, buffer ``(B, m_bias)``; give both or neither.
        route: as for :func:`sketch_linear_grads`.

    Returns:
        ``(B, ..., d_out)``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; only one of ``bias_sketch``/``bias_out`` is given.
    """
    _checks.instance("sketch", sketch, TensorSketch)
    x = _checks.float_tensor("x", x, min_dim=2)
    weight = _checks.float_tensor("weight", weight, min_dim=2)
    _checks.last_dim("x", x, sketch.d_in, "d_in")
    if tuple(weight.shape) != (sketch.d_out, sketch.d_in):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, the sketch was made for "
            f"({sketch.d_out}, {sketch.d_in}); make the sketch for this layer"
        )
    if bias is not None and tuple(bias.shape) != (sketch.d_out,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}; pass shape ({sketch.d_out},)")
    _checks.same_device(x=x, weight=weight)
    dtype = _checks.sketch_dtype(x, weight)
    _checks.output_buffer(out, (x.shape[0], sketch.m), dtype, x.device)
    if (bias_sketch is None) != (bias_out is None) or (bias_sketch is not None and bias is None):
        raise ValueError("bias_sketch, bias_out: pass both (and a bias) to sketch the bias, or neither")
    bias_tables: list[Tensor] = []
    if bias_sketch is not None and bias_out is not None:
        _checks.instance("bias_sketch", bias_sketch, CountSketch)
        if bias_sketch.d != sketch.d_out:
            raise ValueError(
                f"bias_sketch: got one for d={bias_sketch.d}, the bias has {sketch.d_out}; "
                "make the sketch for this bias"
            )
        _checks.output_buffer(bias_out, (x.shape[0], bias_sketch.m), dtype, x.device, name="bias_out")
        bias_tables = bias_sketch.tables(x.device)
    x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
    tokens = math.prod(x.shape[1:-1])
    chosen = plan_linear(x.shape[0], tokens, sketch, x.device, route, dtype=x.dtype).route
    y: Tensor = _sketched_linear(x, weight, bias, out, sketch.tables(x.device), bias_out, bias_tables, chosen)
    return y
