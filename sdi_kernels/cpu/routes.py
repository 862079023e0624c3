"""The accumulating operators on the CPU: compiled kernels where they apply, plain torch elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sdi_kernels import torch_routes
from sdi_kernels._checks import ids_in_range
from sdi_kernels.calls import EmbeddingCall, LinearCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.cpu import native
from sdi_kernels.workspace import workspace_bytes


def _applies(out: Tensor, *inputs: Tensor) -> bool:
    """float32 sums of inputs that the kernels can read, into rows that are dense."""
    return (
        native.library() is not None
        and out.dtype == torch.float32
        and (out.stride(1) == 1 or out.shape[1] == 1)
        and all(t.dtype in native.DTYPES for t in inputs)
    )


def linear(call: LinearCall) -> None:
    """As :func:`sdi_kernels.torch_routes.linear` does it."""
    out, activations, grad_outputs, tables, m, route, metric = call
    route = "direct" if route == "shear" else route  # the same product, arranged for a GPU
    rows, tokens, _ = activations.shape
    if rows == 0 or tokens == 0:
        return
    budget = workspace_bytes(out.device)
    spread = [t for t in (activations, grad_outputs) if t.stride(2) != 1]
    some = rows
    if spread:  # features that are not dense are copied, a few rows at a time
        budget //= 2
        some = max(1, budget // (tokens * sum(t.element_size() * t.shape[2] for t in spread)))
    applies = _applies(out, activations, grad_outputs) and (route == "direct" or native.supports_fft(m))
    dense = metric  # held by name until the calls are over: the kernels read it
    if applies and metric is not None and (metric.dtype != torch.float32 or metric.stride(1) != 1):
        dense = metric.to(torch.float32).contiguous()
    for o, a, g in zip(out.split(some), activations.split(some), grad_outputs.split(some), strict=True):
        if applies:
            a, g = (t if t.stride(2) == 1 else t.clone(memory_format=torch.contiguous_format) for t in (a, g))
            sides = native.side(g, tables[:3]), native.side(a, tables[3:])
            if native.run("sdi_linear_sketch", native.call(o, *sides, tokens, route, budget, metric=dense)):
                continue
        torch_routes.linear(LinearCall(o, a, g, tables, m, route, metric))


linear_steps = functools.partial(torch_routes.linear_steps, one=linear)
""":func:`linear` of every pair of a list, see :func:`.torch_routes.linear_steps`."""


def matrix(call: MatrixCall) -> None:
    """As :func:`sdi_kernels.torch_routes.matrix` does it."""
    if call.grads.shape[0] and not _by_rows(call.out, None, call.grads, call.tables, call.metric):
        torch_routes.matrix(call)


def embedding(call: EmbeddingCall) -> None:
    """As :func:`sdi_kernels.torch_routes.embedding` does it."""
    ids_in_range("token_ids", call.token_ids, len(call.tables[0]))
    if call.grad_outputs.numel() and not _by_rows(call.out, call.token_ids, call.grad_outputs, call.tables, None):
        torch_routes.embedding(call)


def _by_rows(out: Tensor, ids: Tensor | None, given: Tensor, tables: Sequence[Tensor], metric: Tensor | None) -> bool:
    """Sketch matrices whose rows are ``given`` ``(rows, tokens, d_in)`` by the compiled kernel, if it applies."""
    if not (native.has_rows() and _applies(out, given)):
        return False
    # Held by name until the calls are over: the kernel reads them.
    entries = metric
    if metric is not None and (metric.dtype != torch.float32 or metric.stride(1) != 1):
        entries = metric.to(torch.float32).contiguous()
    rows, tokens, d = given.shape
    some = rows
    if given.stride(2) != 1:  # features that are not dense are copied, a few rows at a time
        some = max(1, workspace_bytes(out.device) // max(1, tokens * given.element_size() * d))
    for start in range(0, rows, some):
        part = given[start : start + some]
        part = part if part.stride(2) == 1 else part.clone(memory_format=torch.contiguous_format)
        index = None if ids is None else ids[start : start + some]
        sides = native.ids_side(index, tables[:3]), native.side(part, tables[3:])
        arguments = native.call(
            out[start : start + some], *sides, tokens, "direct", workspace_bytes(out.device), metric=entries
        )
        if not native.run("sdi_rows_sketch", arguments):
            return False
    return True


def vector(call: VectorCall) -> None:
    """As :func:`sdi_kernels.torch_routes.vector` does it."""
    out, grads, tables, _ = call
    if grads.shape[0] == 0 or grads.shape[1] == 0:
        return
    if _applies(out, grads) and grads.stride(2) == 1:
        side, budget = native.side(grads, tables), workspace_bytes(out.device)
        if native.run("sdi_vector_sketch", native.call(out, side, native.Side(), grads.shape[1], "direct", budget)):
            return
    torch_routes.vector(call)


def scaled_vector(call: ScaledVectorCall) -> None:
    """As :func:`sdi_kernels.torch_routes.scaled_vector` does it, in one pass."""
    out, grads, factors, center, scale, tables, _ = call
    if grads.shape[0] == 0 or grads.shape[1] == 0:
        return
    if _applies(out, grads, factors) and grads.stride(2) == factors.stride(2) == 1:
        # Held by name until the call is over: the kernels read them.
        shift, gain = (None if t is None else t.to(torch.float32).contiguous() for t in (center, scale))
        sides = native.side(grads, tables), native.side(factors, tables)
        arguments = native.call(out, *sides, grads.shape[1], "direct", workspace_bytes(out.device), shift, gain)
        if native.run("sdi_vector_sketch", arguments):
            return
    torch_routes.scaled_vector(call)
