"""The routes in plain torch: run on every device, and the fallback where no faster kernel is there.

All functions take a call (:mod:`sdi_kernels.calls`) in canonical shapes (rows, tokens, features), accumulate into its
buffer ``out`` of shape (rows, m), float32 or float64, and keep temporaries under
:func:`sdi_kernels.workspace.workspace_bytes`. Its ``tables`` are those of :meth:`sdi_kernels.TensorSketch.tables` or
:meth:`sdi_kernels.CountSketch.tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sdi_kernels._checks import ids_in_range
from sdi_kernels.calls import EmbeddingCall, LinearCall, LinearStepsCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.workspace import workspace_bytes

INDEX_BYTES = 8
"""Bytes of one position in a scatter: torch wants int64."""


def _chunks(total: int, bytes_each: int, budget: int) -> Iterator[slice]:
    """Slices of ``range(total)`` within the budget.

    Loops over them delete a chunk's temporaries at its end: a name would keep them alive beside the next chunk's.
    """
    size = max(1, budget // max(1, bytes_each))
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def _scatter(values: Tensor, bucket: Tensor, sign: Tensor, m: int) -> Tensor:
    """CountSketch of the last dimension: (..., d) -> (..., m), in ``values``' dtype."""
    out = values.new_zeros(*values.shape[:-1], m)
    return out.index_add_(-1, bucket, values * sign.to(values.dtype))


def _spectrum(values: Tensor, bucket: Tensor, sign: Tensor, m: int) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(_scatter(values, bucket, sign, m))
    return spectrum


def _add_shifted(out: Tensor, values: Tensor, offsets: Tensor, columns: Tensor, m: int) -> None:
    """``out[r, (offsets[i] + columns[j]) % m] += values[r, i, j]``."""
    position = (offsets.long()[:, None] + columns).remainder_(m)
    out.index_add_(1, position.flatten(), values.flatten(1))


def linear(call: LinearCall) -> None:
    """The route by name. The ``metric``, (d_out, d_in), is multiplied into every row's gradient.

    Raises:
        ValueError: a metric with the ``fft`` route, which never has single entries of the gradient.
    """
    if call.activations.shape[0] == 0 or call.activations.shape[1] == 0:
        return
    if call.route != "fft":
        linear_direct(call)
    elif call.metric is None:
        linear_fft(call)
    else:
        raise ValueError("metric: the fft route cannot apply it; use route='direct'")


def linear_steps(call: LinearStepsCall, *, one: Callable[[LinearCall], None] = linear) -> None:
    """``one`` (:func:`linear`, here or of the CPU kernels) of every pair."""
    out, activations, grad_outputs, tables, m, route, steps, rows, metric = call
    for a, g, step, row in zip(activations, grad_outputs, steps, rows, strict=True):
        one(LinearCall(out[row : row + a.shape[0], step], a, g, tables, m, route, metric))


def linear_direct(call: LinearCall) -> None:
    """``direct`` route: outer-product sum per row, times ``metric`` where given, folded into the buckets."""
    out, activations, grad_outputs, tables, m, _, metric = call
    h_out, s_out, _, h_in, s_in, _ = tables
    rows, tokens, d_in = activations.shape
    d_out = grad_outputs.shape[-1]
    # An input side that is not h(j) = j is sketched first: the fold then adds m-wide rows of G at an offset. Not with a
    # metric, which differs between the entries that this would add up.
    folded = metric is None and (
        d_in > m or not torch.equal(h_in, torch.arange(d_in, dtype=h_in.dtype, device=h_in.device))
    )
    width = m if folded else d_in
    columns = torch.arange(m, device=out.device) if folded else h_in
    item = out.element_size()
    budget = workspace_bytes(out.device) // 2  # half for converted inputs, half for the tile of G
    per_row = item * max(d_out * width, 2 * tokens * (d_in + width + d_out))
    for some in _chunks(rows, min(per_row, budget), budget):
        count = some.stop - some.start
        for part in _chunks(d_out, (item * count + INDEX_BYTES) * width, budget):
            tile = out.new_zeros(count, part.stop - part.start, width)
            for run in _chunks(tokens, 2 * item * count * (d_in + width + tile.shape[1]), budget):
                a = activations[some, run].to(out.dtype)
                a = _scatter(a, h_in, s_in, m) if folded else a * s_in.to(a.dtype)
                g = grad_outputs[some, run, part].to(out.dtype) * s_out[part].to(out.dtype)
                with torch.autocast(out.device.type, enabled=False):
                    tile.baddbmm_(g.transpose(1, 2), a)
                del a, g
            if metric is not None:
                tile *= metric[part]
            _add_shifted(out[some], tile, h_out[part], columns, m)
            del tile


def linear_fft(call: LinearCall) -> None:
    """``fft`` route: ``sum_l rfft(CS_out(delta_l)) * rfft(CS_in(a_l))``, one inverse transform per row."""
    out, activations, grad_outputs, tables, m, *_ = call
    h_out, s_out, _, h_in, s_in, _ = tables
    rows, tokens, _ = activations.shape
    bytes_per_token = max(6 * m, 3 * (m + max(len(h_out), len(h_in)))) * out.element_size()
    budget = workspace_bytes(out.device)
    for some in _chunks(rows, bytes_per_token * min(tokens, max(1, budget // bytes_per_token)), budget):
        spectrum: Tensor | None = None
        for part in _chunks(tokens, bytes_per_token * (some.stop - some.start), budget):
            product = (
                _spectrum(grad_outputs[some, part].to(out.dtype), h_out, s_out, m)
                .mul_(_spectrum(activations[some, part].to(out.dtype), h_in, s_in, m))
                .sum(1)
            )
            spectrum = product if spectrum is None else spectrum.add_(product)
        if spectrum is not None:
            out[some] += torch.fft.irfft(spectrum, n=m)


def matrix(call: MatrixCall) -> None:
    """TensorSketch of given matrices (rows, d_out, d_in), times ``metric`` (d_out, d_in) where given."""
    out, grads, tables, m, metric = call
    h_out, s_out, _, h_in, s_in, _ = tables
    rows, d_out, d_in = grads.shape
    budget = workspace_bytes(out.device)
    values_each, position_each = 2 * out.element_size() * d_in, 2 * INDEX_BYTES * d_in  # of one line
    for some in _chunks(rows, min(values_each * d_out, budget), budget):
        for part in _chunks(d_out, values_each * (some.stop - some.start) + position_each, budget):
            values = grads[some, part].to(out.dtype) * s_in.to(out.dtype)
            if metric is not None:
                values *= metric[part]
            values *= s_out[part].to(out.dtype)[:, None]
            position = (h_out[part].long()[:, None] + h_in).remainder_(m).flatten()
            out[some].scatter_add_(1, position.expand(len(values), -1), values.flatten(1))
            del values, position


def embedding(call: EmbeddingCall) -> None:
    """``TS(onehot(id) (x) delta) = s_out(id) roll(CS_in(delta), h_out(id))``: a signed add at an offset."""
    out, token_ids, grad_outputs, tables, m = call
    h_out, s_out, _, h_in, s_in, _ = tables
    ids_in_range("token_ids", token_ids, len(h_out))
    rows, tokens, _ = grad_outputs.shape
    budget = workspace_bytes(out.device)
    per_token = (2 * out.element_size() + INDEX_BYTES) * (len(h_in) + 1)  # one more for the ids' own values
    for some in _chunks(rows, min(per_token * tokens, budget), budget):
        for run in _chunks(tokens, per_token * (some.stop - some.start), budget):
            ids = token_ids[some, run]
            values = grad_outputs[some, run].to(out.dtype) * s_in.to(out.dtype)
            values *= s_out[ids].to(out.dtype)[..., None]
            position = (h_out[ids].long()[..., None] + h_in).remainder_(m)
            out[some].scatter_add_(1, position.flatten(1), values.flatten(1))
            del values, position


def vector(call: VectorCall) -> None:
    """CountSketch of the token sum of (rows, tokens, d)."""
    out, grads, (bucket, sign, _), _ = call
    for some in _chunks(grads.shape[0], 2 * out.element_size() * len(bucket), workspace_bytes(out.device)):
        total = grads[some].sum(1, dtype=out.dtype)
        out[some].index_add_(1, bucket, total * sign.to(out.dtype))


def scaled_vector(call: ScaledVectorCall) -> None:
    """CountSketch of the token sum of ``grads * (factors - center) * scale``; the last two are (rows, tokens)."""
    out, grads, factors, center, scale, tables, m = call
    rows, tokens, d = grads.shape
    budget = workspace_bytes(out.device)
    per_token = 3 * out.element_size() * d
    for some in _chunks(rows, min(per_token * tokens, budget), budget):
        for run in _chunks(tokens, per_token * (some.stop - some.start), budget):
            values = factors[some, run].to(out.dtype, copy=True)
            if center is not None:
                values -= center[some, run].to(out.dtype).unsqueeze(-1)
            if scale is not None:
                values *= scale[some, run].to(out.dtype).unsqueeze(-1)
            values *= grads[some, run]
            vector(VectorCall(out[some], values, tables, m))
            del values


def linear_adjoint(sketch_grads: Tensor, tables: Sequence[Tensor], m: int) -> Tensor:
    """Adjoint of the TensorSketch: (rows, m) -> (rows, d_out, d_in), ``S(i,j) g[H(i,j)]``."""
    h_out, s_out, _, h_in, s_in, _ = tables
    position = (h_out.long()[:, None] + h_in.long()) % m
    return sketch_grads[:, position] * (s_out[:, None] * s_in).to(sketch_grads.dtype)
