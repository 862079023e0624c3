"""The uses of a looped linear layer, sketched by one operator: lists of (activations, gradients) pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdi_kernels import _checks, borders, ops
from sdi_kernels.plan import Route, plan_linear
from sdi_kernels.sketches import TensorSketch


def _listed(name: str, values: object, count: int | None = None) -> list[Tensor]:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: got {type(values).__name__} beside a list of activations; pass a list of tensors")
    if len(values) == 0 or (count is not None and len(values) != count):
        wanted = "at least one tensor" if count is None else f"{count}, one for each of activations"
        raise ValueError(f"{name}: got a list of {len(values)}; pass {wanted}")
    for k, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{k}]: got {type(value).__name__}; pass a torch.Tensor")
    return list(values)


def _numbers(name: str, values: Sequence[int] | None, default: Sequence[int]) -> list[int]:
    """One integer for each pair."""
    if values is None:
        return list(default)
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: got {type(values).__name__}; pass a list of integers, one for each pair")
    if len(values) != len(default):
        raise ValueError(f"{name}: got {len(values)} numbers for {len(default)} pairs; pass one for each")
    return [_checks.integer(f"{name}[{k}]", value) for k, value in enumerate(values)]


def sketch_steps(
    activations: Sequence[Tensor],
    grad_outputs: object,
    sketch: TensorSketch,
    *,
    route: Route,
    metric: Tensor | None,
    steps: Sequence[int] | None,
    rows: Sequence[int] | None,
    out: Tensor | None,
) -> Tensor:
    """:func:`sdi_kernels.sketch_linear_grads` of lists. The route is planned for all pairs together."""
    acts = _listed("activations", activations)
    grads = _listed("grad_outputs", grad_outputs, len(acts))
    # The operator looks at every pair, in every mode: here at the first only, and at what planning needs.
    borders.pairs(acts[:1], grads[:1], sketch.d_in, sketch.d_out)
    shapes = [a.shape for a in acts]
    if any(len(shape) != 3 for shape in shapes):
        borders.pairs(acts, grads, sketch.d_in, sketch.d_out)
    columns = _numbers("steps", steps, range(len(acts)))
    first_rows = _numbers("rows", rows, [0] * len(acts))
    dtype, device, m = _checks.sketch_dtype(acts[0], grads[0]), acts[0].device, sketch.m
    buffer: Tensor | None = None
    if out is None:
        size = [max(row + shape[0] for row, shape in zip(first_rows, shapes, strict=True)), max(columns) + 1]
    else:
        buffer = _checks.float_tensor("out", out, min_dim=3)
        size = list(buffer.shape[:2])
        _checks.output_buffer(buffer, (*size, m), dtype, device)
    entries: Tensor | None = None
    if metric is not None:
        entries = _checks.entry_metric(metric, sketch.d_out, sketch.d_in, route, activations=acts[0]).to(dtype)
        route = "direct" if route == "auto" else route
    total, longest = sum([shape[0] for shape in shapes]), max([shape[1] for shape in shapes])
    chosen = plan_linear(total, longest, sketch, device, route, dtype=acts[0].dtype).route
    tables = sketch.tables(device)
    if buffer is None:
        made: Tensor = ops.linear_steps_sketch(acts, grads, tables, m, chosen, columns, first_rows, size, entries)
        return made
    acts, grads = ([x.detach() if x.requires_grad else x for x in values] for values in (acts, grads))
    ops.add_to(buffer, ops.linear_steps_sketch_, acts, grads, tables, m, chosen, columns, first_rows, entries)
    return buffer
