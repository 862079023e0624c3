"""``torch.library`` operators: fakes, autograd, device kernels.

For each kind of parameter there is one operator that accumulates into a buffer (``*_sketch_``: what device kernels
implement) and one that returns a new sketch (``*_sketch``: differentiable, built on the first). The default body is
plain torch, so every device works; faster kernels are registered for a device type on the accumulating operator only.

Canonical shapes: activations (rows, tokens, d_in), grad_outputs (rows, tokens, d_out), token_ids (rows, tokens),
grads (rows, tokens, d) for vectors and (rows, d_out, d_in) for matrices; metric (d_out, d_in) of the sketch's dtype;
sketches (rows, m). ``linear_steps_sketch`` takes lists of activations and grad_outputs, each with rows and tokens of
its own, and sketches are (rows, steps, m): pair k goes to its rows from ``rows[k]`` on, at ``steps[k]``. ``tables`` as
given by :meth:`TensorSketch.tables`. The checked, shape-polymorphic functions are in :mod:`sdi_kernels.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdi_kernels import borders, torch_routes
from sdi_kernels._checks import sketch_dtype
from sdi_kernels.cpu import routes as cpu_routes
from sdi_kernels.workspace import workspace_bytes

# ---------------------------------------------------------------------------------------------------------------
# Accumulating operators: out += sketch(inputs)


@torch.library.custom_op("sdi_kernels::linear_sketch_", mutates_args={"out"})
def linear_sketch_(
    out: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    tables: Sequence[Tensor],
    m: int,
    route: str,
    metric: Tensor | None = None,
) -> None:
    borders.linear(out, activations, grad_outputs, tables, m, route, metric)
    if activations.shape[0] == 0 or activations.shape[1] == 0:
        return
    torch_routes.linear(out, activations, grad_outputs, tables, m, route, metric)


@torch.library.custom_op("sdi_kernels::linear_steps_sketch_", mutates_args={"out"})
def linear_steps_sketch_(
    out: Tensor,
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    m: int,
    route: str,
    steps: Sequence[int],
    rows: Sequence[int],
    metric: Tensor | None = None,
) -> None:
    borders.linear_steps(out, activations, grad_outputs, tables, m, route, steps, rows, metric)
    torch_routes.linear_steps(out, activations, grad_outputs, tables, m, route, steps, rows, metric)


@torch.library.custom_op("sdi_kernels::matrix_sketch_", mutates_args={"out"})
def matrix_sketch_(out: Tensor, grads: Tensor, tables: Sequence[Tensor], m: int, metric: Tensor | None = None) -> None:
    borders.matrix(out, grads, tables, m, metric)
    torch_routes.matrix(out, grads, tables, m, metric)


@torch.library.custom_op("sdi_kernels::embedding_sketch_", mutates_args={"out"})
def embedding_sketch_(out: Tensor, token_ids: Tensor, grad_outputs: Tensor, tables: Sequence[Tensor], m: int) -> None:
    borders.embedding(out, token_ids, grad_outputs, tables, m)
    torch_routes.embedding(out, token_ids, grad_outputs, tables, m)


@torch.library.custom_op("sdi_kernels::vector_sketch_", mutates_args={"out"})
def vector_sketch_(out: Tensor, grads: Tensor, tables: Sequence[Tensor], m: int) -> None:
    borders.vector(out, grads, tables, m)
    torch_routes.vector(out, grads, tables, m)


@torch.library.custom_op("sdi_kernels::scaled_vector_sketch_", mutates_args={"out"})
def scaled_vector_sketch_(
    out: Tensor,
    grads: Tensor,
    factors: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    tables: Sequence[Tensor],
    m: int,
) -> None:
    borders.scaled_vector(out, grads, factors, center, scale, tables, m)
    torch_routes.scaled_vector(out, grads, factors, center, scale, tables, m)


def add_to(out: Tensor, operator: Callable[..., None], *arguments: Any) -> None:
    """Call one of the operators above with tensors that need no gradient.

    Torch's dispatcher takes its time for each of autograd's two keys (most of all with lists of a hundred tensors). For
    such tensors those have nothing to do but to count that ``out`` was written to.
    """
    if torch.compiler.is_compiling() or out.is_inference():
        operator(out, *arguments)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        operator(out, *arguments)
    torch.autograd.graph.increment_version(out)


# On the CPU: compiled kernels where they are built and apply, the same torch routes elsewhere.
linear_sketch_.register_kernel("cpu")(borders.guarded(borders.linear, cpu_routes.linear))
linear_steps_sketch_.register_kernel("cpu")(borders.guarded(borders.linear_steps, cpu_routes.linear_steps))
matrix_sketch_.register_kernel("cpu")(borders.guarded(borders.matrix, cpu_routes.matrix))
embedding_sketch_.register_kernel("cpu")(borders.guarded(borders.embedding, cpu_routes.embedding))
vector_sketch_.register_kernel("cpu")(borders.guarded(borders.vector, cpu_routes.vector))
scaled_vector_sketch_.register_kernel("cpu")(borders.guarded(borders.scaled_vector, cpu_routes.scaled_vector))


@linear_sketch_.register_fake
@matrix_sketch_.register_fake
@embedding_sketch_.register_fake
@vector_sketch_.register_fake
@scaled_vector_sketch_.register_fake
def _(*arguments: Any) -> None:
    borders.on_one_device(*arguments)


@linear_steps_sketch_.register_fake
def _(out: Tensor, activations: Sequence[Tensor], grad_outputs: Sequence[Tensor], *rest: Any) -> None:
    tables, _, _, steps, rows, *_ = rest
    borders.linear_pairs(activations, grad_outputs, tables)
    borders.on_one_device(out, activations, grad_outputs, *rest)
    borders.slots(steps, rows, activations, out.shape[:2])


# ---------------------------------------------------------------------------------------------------------------
# CUDA: Triton kernels, imported when an operator first meets a CUDA tensor


def _on_cuda(name: str) -> Callable[..., None]:
    """The launcher of this name, in :mod:`sdi_kernels.triton.launch`."""

    def run(*arguments: Any, **options: Any) -> None:
        from sdi_kernels.triton import launch

        getattr(launch, name)(*arguments, **options)

    return run


linear_sketch_.register_kernel("cuda")(borders.guarded(borders.linear, _on_cuda("linear_sketch_")))
linear_steps_sketch_.register_kernel("cuda")(borders.guarded(borders.linear_steps, _on_cuda("linear_steps_sketch_")))
matrix_sketch_.register_kernel("cuda")(borders.guarded(borders.matrix, _on_cuda("matrix_sketch_")))
embedding_sketch_.register_kernel("cuda")(borders.guarded(borders.embedding, _on_cuda("embedding_sketch_")))
vector_sketch_.register_kernel("cuda")(borders.guarded(borders.vector, _on_cuda("vector_sketch_")))
scaled_vector_sketch_.register_kernel("cuda")(borders.guarded(borders.scaled_vector, _on_cuda("scaled_vector_sketch_")))


# ---------------------------------------------------------------------------------------------------------------
# Functional operators: differentiable in activations and gradients


def _zeros(like: Tensor, m: int, *inputs: Tensor) -> Tensor:
    return like.new_zeros(like.shape[0], m, dtype=sketch_dtype(*inputs))


@torch.library.custom_op("sdi_kernels::linear_sketch", mutates_args=())
def linear_sketch(
    activations: Tensor,
    grad_outputs: Tensor,
    tables: Sequence[Tensor],
    m: int,
    route: str,
    metric: Tensor | None = None,
) -> Tensor:
    out = _zeros(activations, m, activations, grad_outputs)
    linear_sketch_(out, activations, grad_outputs, tables, m, route, metric)
    return out


@linear_sketch.register_fake
def _(activations: Tensor, grad_outputs: Tensor, _tables: Sequence[Tensor], m: int, *_: Any) -> Tensor:
    return _zeros(activations, m, activations, grad_outputs)


@torch.library.custom_op("sdi_kernels::linear_steps_sketch", mutates_args=())
def linear_steps_sketch(
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    m: int,
    route: str,
    steps: Sequence[int],
    rows: Sequence[int],
    size: Sequence[int],
    metric: Tensor | None = None,
) -> Tensor:
    if not activations or not grad_outputs or len(size) != 2:
        raise ValueError(
            f"size: got {size} for {len(activations)} pairs; pass rows and steps of the result, and a pair"
        )
    out = activations[0].new_zeros(*size, m, dtype=sketch_dtype(activations[0], grad_outputs[0]))
    linear_steps_sketch_(out, activations, grad_outputs, tables, m, route, steps, rows, metric)
    return out


@linear_steps_sketch.register_fake
def _(
    activations: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    m: int,
    _route: str,
    steps: Sequence[int],
    rows: Sequence[int],
    size: Sequence[int],
    *_: Any,
) -> Tensor:
    borders.linear_pairs(activations, grad_outputs, tables)
    borders.slots(steps, rows, activations, size)
    return activations[0].new_empty(*size, m, dtype=sketch_dtype(activations[0], grad_outputs[0]))


@torch.library.custom_op("sdi_kernels::matrix_sketch", mutates_args=())
def matrix_sketch(grads: Tensor, tables: Sequence[Tensor], m: int, metric: Tensor | None = None) -> Tensor:
    out = _zeros(grads, m, grads)
    matrix_sketch_(out, grads, tables, m, metric)
    return out


@matrix_sketch.register_fake
def _(grads: Tensor, tables: Sequence[Tensor], m: int, metric: Tensor | None = None) -> Tensor:
    return _zeros(grads, m, grads)


@torch.library.custom_op("sdi_kernels::embedding_sketch", mutates_args=())
def embedding_sketch(token_ids: Tensor, grad_outputs: Tensor, tables: Sequence[Tensor], m: int) -> Tensor:
    out = _zeros(grad_outputs, m, grad_outputs)
    embedding_sketch_(out, token_ids, grad_outputs, tables, m)
    return out


@embedding_sketch.register_fake
def _(token_ids: Tensor, grad_outputs: Tensor, tables: Sequence[Tensor], m: int) -> Tensor:
    return _zeros(grad_outputs, m, grad_outputs)


@torch.library.custom_op("sdi_kernels::vector_sketch", mutates_args=())
def vector_sketch(grads: Tensor, tables: Sequence[Tensor], m: int) -> Tensor:
    out = _zeros(grads, m, grads)
    vector_sketch_(out, grads, tables, m)
    return out


@vector_sketch.register_fake
def _(grads: Tensor, tables: Sequence[Tensor], m: int) -> Tensor:
    return _zeros(grads, m, grads)


# ---------------------------------------------------------------------------------------------------------------
# Autograd: sketches are linear in the gradient and bilinear in (activations, grad_outputs). A metric is a constant.

NO_TABLE_GRADS: list[None] = [None] * 6
"""What a backward returns for the list of the six tables of a TensorSketch: autograd wants the list's structure."""


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, grad_outputs, tables, _, _, metric = inputs
    ctx.save_for_backward(activations, grad_outputs, metric, *tables)


def _pair_backward(
    grad: Tensor, a: Tensor, delta: Tensor, tables: Sequence[Tensor], metric: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a pair of activations and output gradients, where needed, from ``grad``, (rows, m)."""
    rows = max(1, workspace_bytes(grad.device) // (2 * grad.element_size() * delta.shape[-1] * a.shape[-1]))
    grads_a, grads_g = [], []
    for g, some_a, some_delta in zip(grad.split(rows), a.split(rows), delta.split(rows), strict=True):
        weight = torch_routes.linear_adjoint(g, tables, grad.shape[-1])
        if metric is not None:
            weight = weight * metric.to(weight.dtype)
        if needs[0]:
            grads_a.append((some_delta.to(g.dtype) @ weight).to(a.dtype))
        if needs[1]:
            grads_g.append((some_a.to(g.dtype) @ weight.transpose(1, 2)).to(delta.dtype))
    return torch.cat(grads_a) if needs[0] else None, torch.cat(grads_g) if needs[1] else None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    activations, grad_outputs, metric, *tables = ctx.saved_tensors
    grads = _pair_backward(grad, activations, grad_outputs, tables, metric, ctx.needs_input_grad[:2])
    # As many as the call had arguments: torch does not count defaults that were left out.
    return (*grads, NO_TABLE_GRADS, None, None, None)[: len(ctx.needs_input_grad)]


def _linear_steps_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, grad_outputs, tables, _, _, ctx.steps, ctx.rows, _, metric = inputs
    ctx.save_for_backward(*activations, *grad_outputs, metric, *tables)


def _linear_steps_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pairs = len(ctx.steps)
    saved = ctx.saved_tensors
    activations, grad_outputs, (metric, *tables) = saved[:pairs], saved[pairs : 2 * pairs], saved[2 * pairs :]
    found = [
        _pair_backward(grad[row : row + a.shape[0], step], a, g, tables, metric, needs)
        for a, g, step, row, *needs in zip(
            activations, grad_outputs, ctx.steps, ctx.rows, *ctx.needs_input_grad[:2], strict=True
        )
    ]
    grads_a, grads_g = ([pair[side] for pair in found] for side in (0, 1))
    return (grads_a, grads_g, NO_TABLE_GRADS, *[None] * 6)[: len(ctx.needs_input_grad)]


def _matrix_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, tables, ctx.m, metric = inputs
    ctx.dtype = grads.dtype
    ctx.save_for_backward(metric, *tables)


def _matrix_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    metric, *tables = ctx.saved_tensors
    weight = torch_routes.linear_adjoint(grad, tables, ctx.m)
    if metric is not None:
        weight = weight * metric.to(weight.dtype)
    return (weight.to(ctx.dtype), NO_TABLE_GRADS, None, None)[: len(ctx.needs_input_grad)]


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_ids, grad_outputs, tables, ctx.m = inputs
    ctx.dtype = grad_outputs.dtype
    ctx.save_for_backward(token_ids, *tables)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    token_ids, h_out, s_out, _, h_in, s_in, _ = ctx.saved_tensors
    position = (h_out.long()[token_ids][..., None] + h_in.long()) % ctx.m
    picked = grad.gather(1, position.flatten(1)).view(position.shape)
    return None, (picked * (s_out[token_ids][..., None] * s_in).to(grad.dtype)).to(ctx.dtype), NO_TABLE_GRADS, None


def _vector_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grads, tables, _ = inputs
    ctx.dtype, ctx.shape = grads.dtype, grads.shape
    ctx.save_for_backward(*tables[:2])


def _vector_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bucket, sign = ctx.saved_tensors
    total = grad[:, bucket.long()] * sign.to(grad.dtype)
    return total[:, None].expand(ctx.shape).to(ctx.dtype), NO_TABLE_GRADS[:3], None


linear_sketch.register_autograd(_linear_backward, setup_context=_linear_setup)
linear_steps_sketch.register_autograd(_linear_steps_backward, setup_context=_linear_steps_setup)
matrix_sketch.register_autograd(_matrix_backward, setup_context=_matrix_setup)
embedding_sketch.register_autograd(_embedding_backward, setup_context=_embedding_setup)
vector_sketch.register_autograd(_vector_backward, setup_context=_vector_setup)
